"""Several optimizers that the user steps: own steps, one end, and resuming."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader, IterableDataset

from lightning_rigl import RigLCallback, UpdateSchedule
from tests.callbacks.problems import Small, data, trainer

NAMES = "generator", "critic"


class GAN(pl.LightningModule):
    """Two networks, two optimizers; the generator steps every ``rate``-th batch of an epoch."""

    def __init__(self, rate=1, toggle=True, fused=False):
        super().__init__()
        self.automatic_optimization = False
        self.rate, self.toggle, self.fused = rate, toggle, fused
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.critic = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 1))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        real, noise = batch[0], batch[0].flip(1)[:, :8]
        yes, no = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        if batch_idx % self.rate == 0:
            self.step(generator, lambda: bce(self.critic(self.generator(noise)), yes))
        self.step(
            critic,
            lambda: bce(self.critic(real), yes) + bce(self.critic(self.generator(noise)), no),
        )

    def step(self, optimizer, loss):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return (
            torch.optim.AdamW(self.generator.parameters(), 0.01, fused=self.fused),
            torch.optim.SGD(self.critic.parameters(), 0.05, momentum=0.9, fused=self.fused),
        )


def gan(**arguments):
    torch.manual_seed(0)
    return GAN(**arguments)


class Watch(pl.Callback):
    """Counts steps and batches for itself; place it after the callback that it watches.

    Attributes:
        updates: network -> (its own steps, batches, steps of all, drop fraction) at each update.
        steps: network -> its steps, counted at every step of it.
    """

    def __init__(self, rigl):
        self.rigl, self.batches, self.all = rigl, -1, 0
        self.updates, self.steps = {name: [] for name in NAMES}, dict.fromkeys(NAMES, 0)
        self.moments = {name: [] for name in NAMES}

    def on_train_start(self, trainer, module):
        self.masks, self.done = self.copy(), self.rigl.sparsifier.updates

    def copy(self):
        return {name: mask.clone() for name, mask in self.rigl.masks.items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        own = NAMES[trainer.optimizers.index(optimizer)]
        masks, sparsifier = self.copy(), self.rigl.sparsifier
        moved = {name.split(".")[0] for name, mask in masks.items() if not mask.equal(self.masks[name])}
        if updated := sparsifier.updates > self.done:
            now = self.steps[own], self.batches, self.all, sparsifier.drop_fraction
            self.updates[own].append(now)
        assert moved <= ({own} if updated else set())
        self.masks, self.done = masks, sparsifier.updates
        self.moments[own].append((self.batches, self.all))
        self.steps[own] += 1
        self.all += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, mask in self.rigl.masks.items():
            assert int(mask.sum()) == self.rigl.sparsifier.counts[name]
            assert (module.get_parameter(name)[~mask] == 0).all()
        trainer.should_stop = self.batches == 200  # a training without limits

    def own_steps(self, name):
        return [update[0] for update in self.updates[name]]


def fit(rigl, module, loader=None, ckpt=None, callbacks=(), **arguments):
    watch = Watch(rigl)
    run = trainer(rigl, watch, *callbacks, **arguments)
    run.fit(module, data() if loader is None else loader, ckpt_path=ckpt)
    return watch


@pytest.mark.parametrize("toggle", [True, False])
@pytest.mark.parametrize("rate", [1, 2, 5])
def test_each_optimizer_counts_its_own_steps(rate, toggle):
    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=4, end=20, drop_fraction=0.5))
    watch = fit(rigl, gan(rate=rate, toggle=toggle))
    assert watch.steps == {"generator": 5 * math.ceil(8 / rate), "critic": 40}
    for name, steps in watch.steps.items():
        assert watch.own_steps(name) == list(range(4, min(20, steps), 4))
    for step, _, _, drop_fraction in watch.updates["critic"]:
        assert drop_fraction == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 20)))


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling(fused):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=4, end=20, drop_fraction=0.5))
    watch = fit(rigl, gan(rate=2, fused=fused), plugins=[plugin])
    assert watch.own_steps("generator") == watch.own_steps("critic") == [4, 8, 12, 16]


class Endless(IterableDataset):
    def __iter__(self):
        yield from iter(lambda: torch.randn(16), None)


LIMITS = {  # how the training is limited -> the batches and the steps of all optimizers after which it ends
    "epochs": ({"max_epochs": 10}, 80, None),
    "batches of an epoch": ({"max_epochs": 20, "limit_train_batches": 4}, 80, None),
    "epochs first": ({"max_epochs": 10, "max_steps": 1000}, 80, None),
    "steps": ({"max_epochs": -1, "max_steps": 80}, None, 80),
    "steps first": ({"max_epochs": 10, "max_steps": 80}, None, 80),
    "steps of an endless loader": ({"max_epochs": 10, "max_steps": 80}, None, 80),
}


@pytest.mark.parametrize("rate", [1, 2, 5])
@pytest.mark.parametrize("limit", LIMITS)
def test_all_networks_reach_a_fractional_end_together(limit, rate):
    arguments, batches, steps = LIMITS[limit]
    endless = DataLoader(Endless(), batch_size=8, collate_fn=lambda rows: [torch.stack(rows)])
    loader = endless if "endless" in limit else data()
    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=2, end=0.75, drop_fraction=0.5))
    watch = fit(rigl, gan(rate=rate), loader, **arguments)

    def progress(batch, step):
        return batch / batches if batches else step / steps

    assert progress(watch.batches + 1, watch.all) >= 1
    for name in NAMES:
        reached = next(own for own, now in enumerate(watch.moments[name]) if progress(*now) >= 0.75)
        assert 0 < reached - watch.own_steps(name)[-1] <= 2
        assert watch.own_steps(name) == list(range(2, reached, 2))
        for _, batch, step, drop_fraction in watch.updates[name]:
            cosine = 0.25 * (1 + math.cos(math.pi * progress(batch, step) / 0.75))
            assert drop_fraction == pytest.approx(cosine, rel=1e-9)


def test_no_update_takes_place_at_the_end_itself():
    """Of 157 batches 117 are a share that no float says exactly."""
    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=1, end=0.75))
    watch = fit(rigl, gan(), data(157 * 2, batch_size=2), max_epochs=1)
    assert watch.own_steps("critic") == list(range(1, math.floor(0.75 * 157)))


@pytest.mark.parametrize("arguments", [{"max_epochs": 5}, {"max_steps": 50}], ids=str)
def test_a_fractional_begin_is_refused_before_the_model_changes(arguments):
    module = gan()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"begin=0\.1.*manual optimization.*begin=<steps>"):
        fit(RigLCallback(0.6, schedule=UpdateSchedule(every=2, begin=0.1)), module, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_an_unknown_length_is_refused_before_the_model_changes():
    module = gan()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"end=<steps>"):
        fit(RigLCallback(0.6), module, DataLoader(Endless(), batch_size=8), max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


SCHEDULE = UpdateSchedule(every=2, end=0.75, drop_fraction=0.5)
EPOCHS, STEPS = {"max_epochs": 5}, {"max_epochs": -1, "max_steps": 60}
BOTH = {"max_epochs": 9, "max_steps": 60}


class TestResuming:
    """Epochs of 12 steps.

    With max_steps Lightning repeats a batch after a checkpoint that was saved at the end of an epoch, but not
    after one that was saved at its last batch.
    """

    def run(self, folder, ckpt=None, schedule=SCHEDULE, at_batch=True, **arguments):
        module, rigl = gan(rate=2), RigLCallback(0.6, schedule=schedule, seed=1)
        steps = 12 if at_batch else None
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=steps)
        watch = fit(rigl, module, ckpt=ckpt, callbacks=[keep], enable_checkpointing=True, **arguments)
        return module, rigl, watch

    @pytest.mark.parametrize(
        ("limit", "at_batch"), [(EPOCHS, False), (EPOCHS, True), (STEPS, True), (BOTH, True)], ids=str
    )
    @pytest.mark.parametrize("schedule", [SCHEDULE, UpdateSchedule(every=3, end=26)], ids=["share", "steps"])
    def test_at_an_epoch_end_is_bitwise(self, schedule, limit, at_batch, tmp_path):
        straight, rigl, watch = self.run(tmp_path, None, schedule, at_batch, **limit)
        for epochs in (1, 2, 3):
            ckpt = tmp_path / f"step={12 * epochs}.ckpt"
            resumed, again, later = self.run(tmp_path / "again", ckpt, schedule, **limit)
            assert watch.steps["critic"] == later.steps["critic"] + 8 * epochs
            assert later.updates["critic"]
            for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
                assert torch.equal(a, b)
            assert all(torch.equal(rigl.masks[name], again.masks[name]) for name in rigl.masks)
            assert rigl.sparsifier.updates == again.sparsifier.updates

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (EPOCHS, {"max_epochs": 10}),
            (EPOCHS, {"max_epochs": 7}),
            (EPOCHS, {"max_epochs": -1, "max_steps": 120}),
            (EPOCHS, {"max_epochs": -1}),
            (STEPS, {"max_epochs": -1, "max_steps": 120}),
            (STEPS, {"max_epochs": 10}),
            (BOTH, {"max_epochs": 12, "max_steps": 120}),
        ],
        ids=str,
    )
    def test_a_longer_training_keeps_the_end_and_the_drop_fractions(self, first, second, tmp_path):
        """The schedule is the one that the first run resolved, as in automatic optimization."""
        _, _, watch = self.run(tmp_path, **first)
        _, _, later = self.run(tmp_path / "again", tmp_path / "step=12.ckpt", **second)
        for name, done in (("generator", 4), ("critic", 8)):
            rest = {own - done: fraction for own, _, _, fraction in watch.updates[name] if own >= done}
            assert rest
            assert {own: fraction for own, _, _, fraction in later.updates[name]} == pytest.approx(rest)

    @pytest.mark.parametrize("in_steps_first", [False, True])
    def test_another_schedule_does_not_change_what_the_end_counts(self, in_steps_first, tmp_path):
        schedules = SCHEDULE, UpdateSchedule(every=2, end=14)
        first, second = reversed(schedules) if in_steps_first else schedules
        _, _, watch = self.run(tmp_path, None, first, **EPOCHS)
        _, _, later = self.run(tmp_path / "again", tmp_path / "step=12.ckpt", second, **EPOCHS)
        for name, done in (("generator", 4), ("critic", 8)):
            rest = [own - done for own in watch.own_steps(name) if own >= done]
            assert rest
            assert later.own_steps(name) == rest


def test_a_second_fit_goes_on_to_the_new_end():
    rigl = RigLCallback(0.6, schedule=SCHEDULE)
    module, watch = gan(rate=2), Watch(rigl)
    run = trainer(rigl, watch, max_epochs=5)
    run.fit(module, data())
    run.fit_loop.max_epochs = 10
    run.fit(module, data())
    assert watch.own_steps("critic") == [*range(2, 30, 2), *range(40, 60, 2)]
    assert watch.own_steps("generator") == [*range(2, 15, 2), *range(20, 30, 2)]


class Bypass(Small):
    """Steps that go past Lightning's hooks."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(batch[0]), batch[1]).backward()
        optimizer.step()


def test_steps_that_go_past_the_hooks_are_noticed():
    module, rigl = Bypass(), RigLCallback(0.6, "static")
    with pytest.warns(UserWarning, match="moves inactive weights"):
        trainer(rigl).fit(module, data())
    for name, mask in rigl.masks.items():
        assert (module.get_parameter(name)[~mask] == 0).all()


class TwoHeads(pl.LightningModule):
    """One encoder, trained by both of two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        for optimizer, head in zip(self.optimizers(), (self.a, self.b), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(head(self.encoder(batch[0])), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([*self.encoder.parameters(), *h.parameters()], 0.1) for h in (self.a, self.b)]


def test_a_layer_of_two_optimizers_is_refused_before_the_model_changes():
    module = TwoHeads()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"encoder\.weight belongs to the optimizers 0 and 1"):
        trainer(RigLCallback(0.5)).fit(module, data())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    rigl = RigLCallback(0.5, "static")
    trainer(rigl).fit(module, data())
    assert all((module.get_parameter(name)[~mask] == 0).all() for name, mask in rigl.masks.items())


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
def test_a_checkpoint_made_before_our_own_batch_end_counts_the_step(place, tmp_path):
    """A callback that stands before ours, or the module itself, saves after the optimizer's step."""

    class Saving(GAN):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if place == "training_step":
                save(self.trainer)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if place == "on_train_batch_end":
                save(trainer)

    def save(trainer):
        trainer.save_checkpoint(tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt")

    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=3, end=30))
    trainer(Save(), rigl, max_epochs=1).fit(Saving(), data())
    for batches, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: int(f.stem)), start=1):
        steps = torch.load(file, weights_only=True)["callbacks"]["RigLCallback"]["steps"]
        assert steps[0] == batches


class EveryOther(Small):
    """Accumulates two batches by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("method", ["gradual", "gradualglobal", "gemminer"])
def test_pruning_that_does_not_come_to_its_last_update_says_so(method):
    """40 batches, 20 steps: the last update by the trainer's clock is due at its step 27."""
    schedule = UpdateSchedule(every=3, begin=3, end=0.75, policy="after_step")
    rigl = RigLCallback(0.8, method, schedule=schedule, seed=0)
    with pytest.warns(UserWarning, match=r"has left \d+ connections, and 98 were asked for: an optimizer"):
        trainer(rigl).fit(EveryOther(), data())
    assert rigl.sparsifier.updates
    assert sum(rigl.sparsifier.counts.values()) > 98
