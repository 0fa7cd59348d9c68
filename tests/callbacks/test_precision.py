"""Every precision of the Trainer: zeros, counts, types, the grid of updates, and loss scaling."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW

from lightning_rigl import RigL, RigLCallback, UpdateSchedule
from tests.callbacks.problems import Small, data, small, trainer

SCHEDULE = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5)
GRID = [6, 12, 18, 24]
FUSED = {
    "sgd-fused": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adamw-fused": partial(AdamW, lr=0.01, fused=True),
}
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01),
    **FUSED,
}


class Watch(pl.Callback):
    """What holds after each batch, and copies of weights, masks and optimizer state after each step."""

    def __init__(self, rigl):
        self.rigl, self.updates, self.weights, self.masks, self.state = rigl, [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        sparsifier = self.rigl.sparsifier
        for name, mask in self.rigl.masks.items():
            assert int(mask.sum()) == sparsifier.counts[name]
            assert (module.get_parameter(name)[~mask] == 0).all()
        if sparsifier.updates > len(self.updates):
            self.updates.append(trainer.global_step - 1)
        self.masks.append(copy.deepcopy(self.rigl.masks))
        self.weights.append(copy.deepcopy(dict(module.named_parameters())))
        state = trainer.optimizers[0].state
        self.state.append({name: copy.deepcopy(state[p]) for name, p in module.named_parameters()})

    def assert_nothing_moved(self, step, but=frozenset()):
        """No weight and no optimizer state did in this step; those at ``but`` (name -> where) became 0."""
        for name, weight in self.weights[step].items():
            before = {"weight": self.weights[step - 1][name], **self.state[step - 1][name]}
            for key, value in {"weight": weight, **self.state[step][name]}.items():
                if name in but and value.shape == weight.shape:
                    assert (value[but[name]] == 0).all()
                    assert torch.equal(value[~but[name]], before[key][~but[name]]), (name, key)
                else:
                    assert torch.equal(value, before[key]), (name, key)


def equal_masks(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
    ],
)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_zeros_counts_types_and_the_grid(method, precision, dtype):
    module, rigl = small(), RigLCallback(0.8, method, schedule=SCHEDULE)
    watch = Watch(rigl)
    trainer(rigl, watch, precision=precision).fit(module, data())
    assert watch.updates == GRID
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(m.dtype == torch.bool for m in rigl.masks.values())
    for step in GRID:
        assert not equal_masks(watch.masks[step - 1], watch.masks[step])


class Recorder(RigL):
    """RigL, remembering what it was given."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def grow_score(self, layer):
        self.seen.append((layer.weight.clone(), layer.grad.clone()))
        return super().grow_score(layer)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.float32), ("16-true", torch.float32), ("64-true", torch.float64)],
)
def test_scores_are_made_of_32_bits_at_least(precision, dtype):
    method = Recorder()
    trainer(RigLCallback(0.8, method, schedule=SCHEDULE), precision=precision).fit(small(), data())
    assert len(method.seen) == 2 * len(GRID)
    assert {values.dtype for pair in method.seen for values in pair} == {dtype}


class Scaled(MixedPrecision):
    """Loss scaling as in 16-mixed, with a real GradScaler, on a forward pass in float32."""

    def __init__(self, init_scale=2.0**10):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))

    @contextmanager
    def forward_context(self):
        yield


def half(init_scale=2.0**10):
    """16-mixed as on a GPU. (Of precision="16-mixed" Lightning makes bf16-mixed on a CPU.)"""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def scaled_run(plugin, optimizer, *callbacks, method="rigl", model=Small, schedule=SCHEDULE, **arguments):
    torch.manual_seed(0)
    module, rigl = model(optimizer=optimizer), RigLCallback(0.8, method, schedule=schedule, seed=4)
    watch = Watch(rigl)
    plugins = [] if plugin is None else [plugin]
    trainer(*callbacks, rigl, watch, plugins=plugins, **arguments).fit(module, data())
    return watch


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_power_of_two_as_loss_scale_changes_nothing(optimizer):
    """Bitwise, with the gradient that the method is given: also a fused optimizer's is unscaled."""
    methods = Recorder(), Recorder()
    dense = scaled_run(None, optimizer, method=methods[0])
    scaled = scaled_run(Scaled(), optimizer, method=methods[1])
    assert dense.updates == scaled.updates == GRID
    for first, second in zip(methods[0].seen, methods[1].seen, strict=True):
        assert torch.equal(first[1], second[1])
    assert equal_masks(dense.masks[-1], scaled.masks[-1])
    assert all(torch.equal(dense.weights[-1][k], scaled.weights[-1][k]) for k in dense.weights[-1])


@pytest.mark.parametrize("begin", [0, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_in_16_mixed_an_update_takes_the_place_of_the_step(optimizer, begin):
    schedule = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5, begin=begin)
    watch = scaled_run(half(), optimizer, schedule=schedule)
    assert watch.updates == ([] if begin is None else [0]) + GRID
    for step in GRID:
        changed = {name: watch.masks[step - 1][name] ^ mask for name, mask in watch.masks[step].items()}
        assert all(where.any() for where in changed.values())
        watch.assert_nothing_moved(step, but=changed)


class Overflow(pl.Callback):
    """Gradients too large for the scale at the first due update and the step after it."""

    STEPS = 6, 7

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.STEPS:
            module.net[0].weight.grad.view(-1)[3] = float("inf")


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_that_meets_an_overflow_is_postponed_and_said_once(optimizer):
    plugin = half()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        watch = scaled_run(plugin, optimizer, Overflow())
    assert watch.updates == [8, 12, 18, 24]
    assert len([w for w in said if "was not finite" in str(w.message)]) == 1
    assert plugin.scaler.get_scale() == 2.0**8  # backed off twice
    for step in Overflow.STEPS:
        assert equal_masks(watch.masks[5], watch.masks[step])
        watch.assert_nothing_moved(step)
    assert not equal_masks(watch.masks[7], watch.masks[8])


def test_a_scale_that_is_too_large_backs_off_before_the_first_update():
    plugin = half(init_scale=2.0**40)
    watch = scaled_run(plugin, OPTIMIZERS["sgd"], schedule=UpdateSchedule(every=6, end=36, begin=0))
    assert plugin.scaler.get_scale() < 2.0**40
    assert watch.updates[0] > 0
    assert watch.updates[-1] == 30
    assert all(w.isfinite().all() for w in watch.weights[-1].values())


class Skips(Small):
    """Gives no loss in the last batch before the first update."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return None if last and self.trainer.global_step == 6 else loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_batch_without_loss_at_an_update_leaves_the_scaler_alone(optimizer, accumulate):
    settings = {"model": Skips, "accumulate_grad_batches": accumulate}
    dense = scaled_run(None, optimizer, **settings)
    scaled = scaled_run(Scaled(), optimizer, **settings)
    assert dense.updates[-1] == scaled.updates[-1] == (24 if accumulate == 1 else 12)
    assert equal_masks(dense.masks[-1], scaled.masks[-1])
    assert all(torch.equal(dense.weights[-1][k], scaled.weights[-1][k]) for k in dense.weights[-1])
