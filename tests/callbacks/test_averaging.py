"""Weight averages beside RigL: what is validated, saved and returned has the zeros of the masks."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_rigl import RigLCallback, UpdateSchedule, load_masks
from tests.callbacks.problems import Small, data, trainer
from tests.model.problems import Noisy

SCHEDULE = UpdateSchedule(every=3, end=33, drop_fraction=0.5)
RATE = 0.125  # of the optimizer and of SWA: its schedule then changes nothing


class LateThird(WeightAveraging):
    """Holds the weights from before the fit until step 10, then averages every third."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 10 and step_idx % 3 == 1


def swa():
    return StochasticWeightAveraging(RATE, swa_epoch_start=2, annealing_epochs=1, annealing_strategy="linear")


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "mean": WeightAveraging,
    "third": LateThird,
    "SWA": swa,
}
MOMENTS = {"EMA": range(40), "mean": range(40), "third": range(10, 40, 3), "SWA": range(7, 39, 8)}


class Watched(Small):
    """Calls ``look`` inside each validation step."""

    def __init__(self, net=None, optimizer=lambda p: torch.optim.SGD(p, RATE, momentum=0.5)):
        torch.manual_seed(0)
        super().__init__(optimizer)
        self.net = (net or self.net).double()
        self.look = lambda module: None

    def validation_step(self, batch, batch_idx):
        self.look(self)


class History(pl.Callback):
    """The trained weights and the masks after each batch, and the steps of the updates."""

    def __init__(self, rigl):
        self.rigl, self.weights, self.masks, self.updates = rigl, [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(values(module))
        self.masks.append({name: mask.clone() for name, mask in self.rigl.masks.items()})
        if self.rigl.sparsifier.updates > len(self.updates):
            self.updates.append(trainer.global_step - 1)


class Run:
    """Five epochs of eight steps."""

    def __init__(
        self,
        average=None,
        rigl_first=False,
        validate=True,
        keep=None,
        resume=None,
        schedule=SCHEDULE,
        **model,
    ):
        self.module, self.rigl = Watched(**model), RigLCallback(0.6, "set", schedule=schedule, seed=1)
        self.history, self.strays = History(self.rigl), []
        self.module.look = lambda module: self.strays.append(strays(values(module), self.rigl.masks))
        averages = [AVERAGES[average]()] if average else []
        callbacks = [self.rigl, *averages] if rigl_first else [*averages, self.rigl]
        callbacks += [keep, self.history] if keep else [self.history]
        self.trainer = trainer(*callbacks, enable_checkpointing=keep is not None, logger=False)
        self.data = data(dtype=torch.float64)
        self.trainer.fit(self.module, self.data, self.data if validate else None, ckpt_path=resume)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def strays(weights, masks):
    return sum(int((weights[name][~mask] != 0).sum()) for name, mask in masks.items())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def by_hand(history, average):
    """The average of the weights at its moments; as its state, that of a dropped connection starts anew."""
    mean, count = history.weights[0], 0
    for step, (weights, masks) in enumerate(zip(history.weights, history.masks, strict=True)):
        if step in MOMENTS[average]:
            rate = 1 if count == 0 else 0.1 if average == "EMA" else 1 / (count + 1)
            mean, count = {name: mean[name] + rate * (weights[name] - mean[name]) for name in mean}, count + 1
        mean = {name: value * masks.get(name, 1) for name, value in mean.items()}
    return mean


def close(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in second) < 1e-12


def each_average(test):
    return pytest.mark.parametrize("average", AVERAGES)(test)


@each_average
@pytest.mark.parametrize("rigl_first", [True, False])
def test_what_is_validated_saved_and_returned_has_the_zeros(average, rigl_first, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = Run(average, rigl_first, keep=keep)
    assert run.strays == [0] * (2 + 5 * 8)  # sanity check, five epochs
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 20 + 1
    for file in files:
        assert strays(torch.load(file, weights_only=True)["state_dict"], load_masks(file)) == 0
    for weights in (values(run.module), torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]):
        assert all((weights[name] != 0).sum() == mask.sum() for name, mask in run.rigl.masks.items())


@each_average
def test_active_connections_hold_the_average(average, tmp_path):
    run = Run(average)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = by_hand(run.history, average)
    assert not close(run.history.weights[-1], expected)
    assert close(values(run.module), expected)
    assert close(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], expected)


@each_average
def test_neither_the_average_nor_its_validation_touches_the_training(average):
    plain, alone, validated = Run(), Run(average, validate=False), Run(average)
    for run in (alone, validated):
        assert all(map(same, run.history.weights, plain.history.weights))
        assert all(map(same, run.history.masks, plain.history.masks))
    assert same(values(alone.module), values(validated.module))


@each_average
def test_resuming_is_bitwise_exact(average, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = Run(average, validate=False, keep=keep)
    for epoch in (0, 2):
        resumed = Run(average, validate=False, resume=tmp_path / f"epoch={epoch}.ckpt")
        rest = len(resumed.history.weights)
        assert rest == 40 - 8 * (epoch + 1)
        assert all(map(same, straight.history.weights[-rest:], resumed.history.weights))
        assert all(map(same, straight.history.masks[-rest:], resumed.history.masks))
        assert same(values(straight.module), values(resumed.module))


@each_average
def test_a_validation_after_the_fit_sees_the_zeros(average):
    run = Run(average, validate=False)
    run.trainer.validate(run.module, run.data, verbose=False)
    assert run.strays == [0] * 8
    assert strays(values(run.module), run.rigl.masks) == 0


@each_average
def test_an_optimizer_that_moves_inactive_weights(average):
    run = Run(average, optimizer=lambda p: Noisy(p, RATE, momentum=0.5))
    assert run.rigl.sparsifier.mixing
    assert set(run.strays) == {0}
    assert close(values(run.module), by_hand(run.history, average))


@pytest.mark.parametrize("average", ["EMA", "mean", "third"])
def test_both_names_of_a_tied_weight_are_saved_with_its_zeros(average, tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    run = Run(average, validate=False, net=net)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert same({"": saved["net.0.weight"]}, {"": saved["net.2.weight"]})
    assert (saved["net.2.weight"][~run.rigl.masks["net.0.weight"]] == 0).all()


class TestAdditionalEpoch:
    """SWA adds an epoch in which BatchNorm sees the averaged weights; Lightning makes one step at its end."""

    def run(self, **settings):
        net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 4))
        return Run("SWA", net=net, **settings)

    @pytest.mark.parametrize("rigl_first", [True, False])
    @pytest.mark.parametrize("validate", [True, False])
    def test_it_updates_and_trains_nothing(self, rigl_first, validate):
        schedule = UpdateSchedule(every=2, end=1000, drop_fraction=0.5)
        run = self.run(rigl_first=rigl_first, validate=validate, schedule=schedule)
        assert run.trainer.global_step == 41
        assert run.history.updates == list(range(2, 40, 2))
        assert run.strays == ([0] * (2 + 6 * 8) if validate else [])
        del run.history.weights[40:], run.history.masks[40:]
        assert close(values(run.module), by_hand(run.history, "SWA"))

    def test_a_fraction_of_training_is_one_of_the_users_epochs(self):
        run = self.run(schedule=UpdateSchedule(every=3, end=0.5))
        assert run.rigl.sparsifier.timetable.end == 20
        assert run.history.updates == [3, 6, 9, 12, 15, 18]

    def test_a_resumed_run_has_it_too(self, tmp_path):
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        straight, resumed = self.run(keep=keep), self.run(resume=tmp_path / "epoch=2.ckpt")
        assert same(straight.module.state_dict(), resumed.module.state_dict())
        assert resumed.trainer.global_step == 41


@each_average
def test_what_another_hook_saves_at_an_update_has_the_zeros(average, tmp_path):
    """After the update and before the end of its batch."""

    class Save(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    Run(average, rigl_first=True, keep=Save())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 40
    for file in files:
        assert strays(torch.load(file, weights_only=True)["state_dict"], load_masks(file)) == 0
