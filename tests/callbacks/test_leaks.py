"""After a fit nothing hangs on the model, and nothing keeps it alive."""

import ctypes
import gc
import mmap
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from tests.callbacks.problems import Small, data, small, trainer

SCHEDULE = UpdateSchedule(every=3, end=30, drop_fraction=0.5)


@pytest.fixture(autouse=True, scope="module")
def _fast_collection():
    """The collector looks only at what was made since."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Item(Small):
    """Its step reads a value, so that FLOPsCallback watches the real one."""

    def training_step(self, batch, batch_idx):
        assert batch[0].sum().item() != 0
        return super().training_step(batch, batch_idx)


class Failing(Small):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 13:
            raise KeyError("in the middle of a run")
        return super().training_step(batch, batch_idx)


class Manual(Small):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def callbacks(method="rigl"):
    return [RigLCallback(0.8, method, schedule=SCHEDULE, seed=0), FLOPsCallback()]


def hooks(owner):
    """How many entries every dict or list of hooks of an object has."""
    return {
        key: len(value) for key, value in vars(owner).items() if "hook" in key and hasattr(value, "__len__")
    }


def attached(module, fit):
    """All that can be attached to a module, its parameters, its optimizers, and to torch itself."""
    return {
        "modules": [
            (name, type(part), sorted(vars(part)), hooks(part), [*part._parameters], [*part._buffers])
            for name, part in module.named_modules()
        ],
        "parameters": [
            (name, type(p), [*vars(p)], p._backward_hooks, p._post_accumulate_grad_hooks, p.is_leaf, p.dtype)
            for name, p in module.named_parameters()
        ],
        "optimizers": [(type(o), sorted(vars(o)), hooks(o)) for o in fit.optimizers],
        "torch": [
            hooks(nn.modules.module),
            hooks(optimizers),
            _get_current_dispatch_mode_stack(),
            _get_current_function_mode_stack(),
        ],
    }


class Probe(pl.Callback):
    """What is attached in the middle of the training."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            self.seen = attached(module, trainer)


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
@pytest.mark.parametrize("kind", [Small, Item, Failing, Manual])
def test_nothing_is_attached_that_is_not_without_the_callbacks(kind, method):
    def run(*own):
        torch.manual_seed(0)
        module, probe = kind(), Probe()
        parameters = [(p, p.data_ptr()) for p in module.parameters()]
        fit = trainer(*own, probe, max_epochs=2)
        try:
            fit.fit(module, data())
        except KeyError:
            assert kind is Failing
        for p, (first, pointer) in zip(module.parameters(), parameters, strict=True):
            assert p is first
            assert p.data_ptr() == pointer
        return probe.seen, attached(module, fit)

    expected = run()
    assert run(*callbacks(method)) == expected


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
@pytest.mark.parametrize("kind", [Small, Item, Failing, Manual])
def test_the_module_is_free_once_module_trainer_and_callbacks_are(kind, method):
    def run():
        module, own = kind(), callbacks(method)
        fit = trainer(*own, max_epochs=2)
        try:
            fit.fit(module, data(), data(16))
        except KeyError:
            assert kind is Failing
        assert own[0].masks
        fit.validate(module, data(16), verbose=False)
        return [weakref.ref(item) for item in (module, fit, *own, own[0].sparsifier, module.net[0].weight)]

    references = run()
    gc.collect()
    assert [reference() for reference in references] == [None] * 6


def test_a_callback_that_is_used_again_lets_go_of_the_first_module():
    own, first = callbacks(), small()
    trainer(*own).fit(first, data())
    reference = weakref.ref(first)
    trainer(*own).fit(small(seed=1), data())
    del first
    gc.collect()
    assert reference() is None


class Large(Small):
    """What one fit keeps of its weights is seen in the memory of the process."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 512), nn.Linear(512, 4))


def tensors():
    """Number and bytes of the live tensors."""
    gc.collect()
    alive = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(alive), sum(tensor.untyped_storage().nbytes() for tensor in alive)


def resident():
    """Bytes of this process in memory, after its free memory was given back; 0 where no system tells."""
    counts, library = Path("/proc/self/statm"), ctypes.CDLL(None)
    if not counts.exists() or not hasattr(library, "malloc_trim"):
        return 0
    library.malloc_trim(0)
    return int(counts.read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("again", [True, False], ids=["the same callbacks", "new callbacks"])
def test_twenty_fits_take_the_memory_of_one(again):
    loader, own, seen = data(32), callbacks(), []
    for _ in range(20):
        torch.manual_seed(0)
        trainer(*(own if again else callbacks()), max_epochs=1).fit(Large(), loader)
        seen.append((*tensors(), resident()))
    count, size, memory = seen[4]
    assert all((n, s) == (count, size) for n, s, _ in seen[4:])
    assert seen[-1][2] - memory < 15 * 512 * 512 / 2  # of each fit, half the bytes of a mask
