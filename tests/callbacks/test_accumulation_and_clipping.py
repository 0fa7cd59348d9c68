"""Updates read the whole accumulated gradient; clipping sees the gradient of active connections only."""

import itertools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from lightning_rigl import RigLCallback, UpdateSchedule
from tests import reference
from tests.callbacks.problems import Small, data, small, trainer

SCHEDULE = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5)
LR, MOMENTUM = 0.1, 0.9


class Summed(Small):
    """A loss that is a sum over samples, so that a last window with fewer of them weighs as one batch."""

    batch_size = 32

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum") / self.batch_size


class Updates(pl.Callback):
    """The first masks, the steps of the updates, and the masks after each."""

    def __init__(self, rigl):
        self.rigl, self.masks, self.steps = rigl, [], []

    def copy(self):
        self.masks.append({name: mask.clone() for name, mask in self.rigl.masks.items()})

    def on_train_start(self, trainer, module):
        self.copy()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.rigl.sparsifier.updates > len(self.steps):
            self.steps.append(trainer.global_step - 1)
            self.copy()


def assert_equal(module, other, atol):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("samples", [256, 288], ids=["whole windows", "a last window of one batch"])
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, 0.1, 0.9), lambda p: torch.optim.AdamW(p, 0.01)]
)
def test_four_batches_of_8_equal_one_of_32(optimizer, samples, method):
    runs = []
    for size, accumulate in ((32, 1), (8, 4)):
        torch.manual_seed(0)
        module, rigl = Summed(optimizer, torch.float64), RigLCallback(0.8, method, schedule=SCHEDULE, seed=4)
        module.batch_size = size
        updates = Updates(rigl)
        fit = trainer(rigl, updates, accumulate_grad_batches=accumulate)
        fit.fit(module, data(samples, size, torch.float64))
        assert fit.global_step == 5 * math.ceil(samples / 32)
        runs.append((module, updates))
    (large, first), (small_, second) = runs
    assert first.steps == second.steps == [6, 12, 18, 24, 30][: len(first.steps)]
    assert len(first.steps) >= 4
    for a, b in zip(first.masks, second.masks, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert_equal(large, small_, atol=1e-10)


class TestTheLengthOfTraining:
    """A fractional end is one of the optimizer steps that take place, whatever makes them fewer."""

    @pytest.mark.parametrize("end", [0.5, 1.0])
    @pytest.mark.parametrize(
        ("tables", "arguments"),
        [
            ([], {"accumulate_grad_batches": 3}),
            ([], {"accumulate_grad_batches": 16, "max_epochs": 9}),
            ([{0: 1, 1: 2}], {}),
            ([{0: 4, 2: 1}], {}),
            ([{1: 3, 3: 16}], {}),
            ([{0: 2}], {"limit_train_batches": 5}),
            ([{0: 2, 3: 3}], {"max_steps": 13}),
            ([{0: 2, 3: 3}], {"max_steps": 13, "max_epochs": -1}),
            ([{0: 2, 3: 3}], {"max_steps": 900}),
            ([{0: 1}, {0: 2, 4: 1}], {}),
        ],
        ids=str,
    )
    def test_in_steps(self, tables, arguments, end):
        rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=2, end=end, drop_fraction=0.5))
        windows = [GradientAccumulationScheduler(dict(table)) for table in tables]
        updates = Updates(rigl)
        fit = trainer(rigl, updates, *windows, **arguments)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit.fit(small(), data())
        assert rigl.sparsifier.timetable.end == math.floor(end * fit.global_step)
        assert updates.steps == list(range(2, rigl.sparsifier.timetable.end, 2))
        assert updates.steps
        assert not [w for w in said if "RigLCallback" in str(w.message)]

    def test_of_a_resumed_run_with_a_table(self, tmp_path):
        def run(epochs, ckpt=None):
            rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=2, end=0.75))
            fit = trainer(rigl, GradientAccumulationScheduler({0: 2, 2: 1}), max_epochs=epochs)
            fit.fit(small(), data(), ckpt_path=ckpt)
            fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return fit, rigl

        first, rigl = run(3)
        assert (first.global_step, rigl.sparsifier.timetable.end) == (16, 12)
        second, rigl = run(4, tmp_path / "3.ckpt")
        assert (second.global_step, rigl.sparsifier.timetable.end) == (24, 12)  # the first run's


def plain_loop(masks, steps, clip, algorithm, epochs, accumulate=1, batch_size=8, every=6):
    """RigL by hand, without the package but for its first masks: SGD that sees active gradients only.

    Returns:
        The module, and the masks at first and after each update.
    """
    module = small(dtype=torch.float64)
    layers = {name: module.get_parameter(name) for name in masks}
    masks = {name: mask.clone() for name, mask in masks.items()}
    momentum = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for name, p in layers.items():
        p.data.mul_(masks[name])
    history, step, end = [dict(masks)], 0, int(0.75 * steps)
    micro = itertools.chain.from_iterable(data(64, batch_size, torch.float64) for _ in range(epochs))
    while window := list(itertools.islice(micro, accumulate)):
        module.zero_grad()
        for x, y in window:
            (nn.functional.cross_entropy(module(x), y) / accumulate).backward()
        if reference.due(step, every, every, end):
            fraction = reference.drop_fraction(step, end, 0.5)
            for name, p in layers.items():
                count = int(fraction * int(masks[name].sum()))
                arrays = p.detach().numpy(), masks[name].numpy(), p.grad.abs().numpy()
                new = torch.from_numpy(reference.update_mask(*arrays, count))
                for tensor in (p.data, momentum[name]):
                    tensor[new != masks[name]] = 0
                masks[name] = new
            history.append(dict(masks))
        else:
            for name, p in layers.items():
                p.grad[~masks[name]] = 0
            clip_ = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
            clip_(module.parameters(), clip)
            for name, p in module.named_parameters():
                momentum[name].mul_(MOMENTUM).add_(p.grad)
                p.data.sub_(LR * momentum[name])
        step += 1
    return module, history


CLIPS = [("norm", 0.1), ("norm", 0.4), ("value", 0.01), ("value", 0.1)]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("algorithm", "clip"), CLIPS)
def test_the_trainer_clips_active_gradients(algorithm, clip, accumulate):
    module, rigl = small(dtype=torch.float64), RigLCallback(0.8, schedule=SCHEDULE, seed=1)
    updates, size = Updates(rigl), 8 // accumulate
    fit = trainer(
        rigl,
        updates,
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
        accumulate_grad_batches=accumulate,
    )
    fit.fit(module, data(batch_size=size, dtype=torch.float64))
    plain, masks = plain_loop(updates.masks[0], 40, clip, algorithm, 5, accumulate, size)
    assert updates.steps == [6, 12, 18, 24]
    for mine, by_hand in zip(updates.masks, masks, strict=True):
        assert all(torch.equal(mine[name], by_hand[name]) for name in mine)
    assert_equal(module, plain, atol=1e-12)


class OwnClipping(Small):
    """Clips in a hook of its own, by Lightning's means or by torch's."""

    def __init__(self, by, **arguments):
        super().__init__(**arguments)
        self.by = by

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.by == "lightning":
            self.clip_gradients(optimizer, 0.1, gradient_clip_algorithm)
        elif any(p.grad is not None for p in self.parameters()):  # there is none at an update
            nn.utils.clip_grad_value_(self.parameters(), 0.1)


@pytest.mark.parametrize("by", ["lightning", "torch"])
def test_clipping_in_a_hook_of_the_module_equals_the_trainers(by):
    results = []
    for module, arguments in (
        (small(), {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (OwnClipping(by), {"gradient_clip_algorithm": "value"}),
    ):
        module.load_state_dict(small().state_dict())
        rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=6), seed=0)
        updates = Updates(rigl)
        trainer(rigl, updates, **arguments).fit(module, data())
        assert len(updates.steps) == 4
        results.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Manual(Small):
    """Clips between the last backward and the step; accumulates by hand."""

    def __init__(self, clip, algorithm, accumulate):
        super().__init__(dtype=torch.float64)
        self.automatic_optimization = False
        self.clip, self.algorithm, self.accumulate = clip, algorithm, accumulate

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm=self.algorithm
            )
            optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("algorithm", "clip"), CLIPS)
def test_clip_gradients_in_manual_optimization_sees_active_gradients(algorithm, clip, accumulate):
    torch.manual_seed(0)
    module, size = Manual(clip, algorithm, accumulate), 8 // accumulate
    # in steps: a fraction of a manual training is one of its batches
    rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=6, end=30, drop_fraction=0.5), seed=1)
    updates = Updates(rigl)
    trainer(rigl, updates).fit(module, data(batch_size=size, dtype=torch.float64))
    plain, masks = plain_loop(updates.masks[0], 40, clip, algorithm, 5, accumulate, size)
    assert updates.steps == [6, 12, 18, 24]
    for mine, by_hand in zip(updates.masks, masks, strict=True):
        assert all(torch.equal(mine[name], by_hand[name]) for name in mine)
    assert_equal(module, plain, atol=1e-12)
