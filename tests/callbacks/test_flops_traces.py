"""A measurement leaves nothing behind: no value, no mode, no hook, no random number, no compiled graph."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from lightning_rigl import FLOPsCallback
from tests.callbacks.flops_modules import EVERY_KIND, ByHand, Item, Noisy, Recomputes, seen
from tests.callbacks.flops_problems import F_D, Manual, Silent, batches, fit, measurements
from tests.callbacks.problems import Small, trainer


def state_of(model):
    return {
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "calls": (model.calls, len(seen)),
        "torch": (
            _len_torch_dispatch_stack(),
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ),
    }


@pytest.mark.parametrize("model", [*EVERY_KIND, Recomputes])
def test_training_with_the_callback_is_training_without_it(model):
    states = []
    for callbacks in ([], [FLOPsCallback()]):
        torch.manual_seed(3), random.seed(3), np.random.seed(3), seen.clear()
        module = model()
        trainer(*callbacks, max_epochs=1).fit(module, batches(8, 8, 4), batches(8))
        states.append(state_of(module))
    assert states[0] == states[1]


@pytest.mark.parametrize("model", [Noisy, Item, ByHand])
def test_a_measurement_leaves_nothing_behind_when_the_first_step_begins(model):
    class Compare(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.states = [*getattr(self, "states", []), {**state_of(module), "torch": None}]

    before, after = Compare(), Compare()
    fit(before, FLOPsCallback(), after, module=model())
    assert before.states[0] == after.states[0]


class Watch(pl.Callback):
    """Whether a tracer is at work, at each hook of each step."""

    def __init__(self):
        self.seen = {}

    def note(self, hook):
        self.seen.setdefault(hook, []).append(_len_torch_dispatch_stack())

    def on_train_batch_start(self, *args):
        self.note("start")

    def on_after_backward(self, *args):
        self.note("after backward")

    def on_train_batch_end(self, *args):
        self.note("end")


@pytest.mark.parametrize(("model", "steps", "backward"), [(Noisy, 0, 0), (Item, 1, 0), (ByHand, 16, 1)])
def test_only_the_first_steps_are_ever_watched_and_of_them_no_optimizer(model, steps, backward):
    watch = Watch()
    fit(FLOPsCallback(), watch, module=model(), sizes=[8] * 18)
    watched, later = [1] * steps, [0] * (18 - steps)
    assert watch.seen["start"] == watched + later
    assert watch.seen["after backward"] == [backward] * steps + later
    assert watch.seen["end"] == [0] * 18


def test_a_first_step_that_fails_is_not_watched_any_longer():
    class Fails(Small):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(FLOPsCallback(), module=Fails())
    assert _len_torch_dispatch_stack() == 0


def test_an_epoch_that_is_cut_short_in_its_first_batch_is_not_watched_any_longer():
    class Skips(Item):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

    class Nothing(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            assert _len_torch_dispatch_stack() == 0

    counter = FLOPsCallback()
    fit(Nothing(), counter, module=Skips(), max_epochs=2)
    assert counter.report().train == 20 * 3 * F_D


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _nothing_compiled_yet(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def test_a_module_is_measured_as_written(self, monkeypatch):
        made, counter = measurements(monkeypatch), FLOPsCallback()
        fit(counter, module=torch.compile(Silent(), backend="eager"))
        assert made == [False] * 2  # its compiled step is bound to the original
        assert counter.report().train == 20 * 3 * F_D

    @pytest.mark.parametrize("base", [Silent, Manual])
    def test_nothing_is_compiled_more_often_than_without_the_callback(self, base):
        def graphs(*callbacks):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            module = base()
            module.net = torch.compile(module.net, backend="eager")
            fit(*callbacks, module=module, sizes=[8] * 18)
            return torch._dynamo.utils.counters["stats"]["unique_graphs"]

        counter = FLOPsCallback()
        assert graphs(counter) == graphs() > 0
        assert counter.report().train == 18 * 8 * 3 * F_D


class TestTheCopy:
    def test_shares_data_sets(self, monkeypatch):
        class Greedy(torch.utils.data.Dataset):
            def __deepcopy__(self, memo):
                raise AssertionError("a data set was copied")

        module, made = Small(), measurements(monkeypatch)
        module.data = Greedy()
        fit(FLOPsCallback(), module=module)
        assert made == [True] * 2

    def test_does_not_see_the_trainer_wherever_the_module_keeps_it(self):
        class Keeps(Small):
            def on_fit_start(self):
                self.boss = self.trainer

            def training_step(self, batch, batch_idx):
                bosses.append(self.boss)
                return super().training_step(batch, batch_idx)

        bosses = []
        run = fit(FLOPsCallback(), module=Keeps(), sizes=[8] * 3)
        assert bosses == [None, run, run, run]

    def test_is_silent(self, capsys, monkeypatch):
        class Talks(Small):
            def training_step(self, batch, batch_idx):
                self.log_dict({"a": 1.0})
                self.print("once per step")
                return super().training_step(batch, batch_idx)

        made = measurements(monkeypatch)
        run = fit(FLOPsCallback(), module=Talks())
        assert made == [True] * 2
        assert capsys.readouterr().out.count("once per step") == 3
        assert {"a", "loss"} < set(run.callback_metrics)
