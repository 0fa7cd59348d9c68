"""The first look of GraSP and SynFlow: on a copy, at the first batch, and nobody notices."""

import copy
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.callbacks.first_look import first_look
from lightning_rigl.methods.base import Method
from lightning_rigl.methods.grasp import GraSP
from lightning_rigl.methods.synflow import SynFlow
from tests.callbacks.flops_problems import F_D, Counts, Manual, Silent
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import StatefulLoader, every_step, read, same

METHODS = [GraSP(), SynFlow()]


class Rich(Small):
    """Everything that a second step before the first one could disturb."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 4)
        )
        self.steps, self.printed = 0, []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.log_dict({"random": random.random(), "numpy": float(np.random.rand())})
        self.print("step")
        batch[0].add_(1)
        return {"loss": super().training_step(batch, batch_idx)}


class Before(pl.Callback):
    """Goes before and behind a RigLCallback: all that it may change at the first batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch == 0:
            state = {
                "model": module.state_dict(),
                "grads": [p.grad for p in module.parameters()],
                "batch": batch,
                "random": [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
                "steps": module.steps,
                "logged": dict(trainer.callback_metrics),
            }
            self.states.append(copy.deepcopy(state))


def equal(first, second):
    if isinstance(first, dict):
        return all(equal(first[k], second[k]) for k in first) and first.keys() == second.keys()
    if isinstance(first, (list, tuple)):
        return all(map(equal, first, second)) and len(first) == len(second)
    if isinstance(first, (torch.Tensor, np.ndarray)):
        return first.tolist() == second.tolist()
    return first == second


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_module_batch_and_random_generators_are_as_before(method, capsys):
    before, callback, module = Before(), RigLCallback(0.8, method), Rich()
    loop = trainer(before, callback, before, max_epochs=2)
    loop.fit(module, data())
    first, second = before.states
    assert equal(first, second)
    assert first["steps"] == 0
    assert module.steps == 16
    assert capsys.readouterr().out.count("step\n") == 16
    assert module.trainer is loop
    assert sum(callback.sparsifier.counts.values()) == 98


class Wanting(Method):
    """Scores by what `looked` holds, so that a test sees how often it is asked."""

    starts_dense = True
    schedule = UpdateSchedule(every=1, begin=2, end=3)
    looked: list = []  # noqa: RUF012

    def look(self, probe):
        self.looked.append(probe)
        return {name: torch.rand(p.shape) for name, p in probe.parameters.items()}

    def turnover(self, layers, moment):
        return [(layer.active - layer.target, 0) for layer in layers]

    def drop_score(self, layer):
        return layer.notes["score"]

    def grow_score(self, layer):
        return layer.mask.float()


def test_it_is_one_look_also_where_the_update_comes_later_and_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(Wanting, "looked", [])

    def fit(folder, resume=None, keep=()):
        loop = trainer(RigLCallback(0.8, Wanting()), *keep, max_epochs=1, enable_checkpointing=True)
        loop.fit(small(), StatefulLoader(), ckpt_path=resume)
        loop.save_checkpoint(folder / "end.ckpt")
        return read(folder / "end.ckpt")

    straight = fit(tmp_path, keep=[every_step(tmp_path)])
    assert len(Wanting.looked) == 1
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["RigLCallback"]
    assert saved["updates"] == 0
    assert same(straight, fit(tmp_path, tmp_path / "step=2.ckpt", [ModelCheckpoint(tmp_path / "again")]))
    assert len(Wanting.looked) == 1


def test_what_a_method_is_given(monkeypatch):
    monkeypatch.setattr(Wanting, "looked", [])
    module, loop = small(), trainer(RigLCallback(0.8, Wanting()), max_epochs=1)
    module.loop, module.loader = loop, data()
    loop.fit(module, module.loader)
    (probe,) = Wanting.looked
    assert probe.model.loop is None
    assert probe.model.loader is module.loader
    assert probe.model is not module
    assert type(probe.model) is Small
    assert {n: p.shape for n, p in probe.parameters.items()} == {
        "net.0.weight": (24, 16),
        "net.2.weight": (4, 24),
    }
    assert all(p is probe.model.get_parameter(name) for name, p in probe.parameters.items())
    assert probe.targets == {"net.0.weight": 58, "net.2.weight": 40}
    assert probe.example.tolist() == next(iter(data()))[0].tolist()
    assert probe.forward(probe.example).shape == (8, 4)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (lambda p: {"net.0.weight": torch.rand(24, 16)}, r"net\.2\.weight has its shape \(4, 24\), got None"),
        (lambda p: {n: torch.rand(3) for n in p}, r"net\.0\.weight has its shape \(24, 16\), got \(3,\)"),
        (lambda p: {n: q * torch.nan for n, q in p.items()}, r"net\.0\.weight is not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, said):
    class Wrong(Wanting):
        def look(self, probe):
            return scores(probe.parameters)

    callback = RigLCallback(0.8, Wrong())
    with pytest.raises(ValueError, match=said):
        trainer(callback, max_epochs=1).fit(small(), data())
    assert not any(layer.notes for layer in callback.sparsifier.layers.values())


class Reads(Silent):
    """Asks for the trainer."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.num_training_batches


def test_a_step_that_gives_no_loss_on_a_copy_is_refused_for_what_needs_one():
    for module, said in ((Manual(), "it optimizes by hand"), (Reads(), "not attached to a `Trainer`")):
        with pytest.raises(MisconfigurationException, match=f"GraSP scores by the loss .*{said}.*snip"):
            trainer(RigLCallback(0.8, GraSP()), max_epochs=1).fit(module, data())
        callback = RigLCallback(0.8, SynFlow())
        trainer(callback, max_epochs=1).fit(module, data())
        assert sum(callback.sparsifier.counts.values()) == 98


def test_a_module_that_cannot_be_copied():
    class Open(Silent):
        def __init__(self):
            super().__init__()
            self.file = open(__file__)  # noqa: SIM115

    with pytest.raises(
        MisconfigurationException, match=r"SynFlow scores a copy of the module.*TextIOWrapper"
    ):
        trainer(RigLCallback(0.8, SynFlow()), max_epochs=1).fit(Open(), data())


class Item(Silent):
    """Its step reads a value, so that FLOPs are counted by watching the real one."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0
        return loss


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [Silent, Item])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_flops_do_not_count_it(method, kind, order):
    sparse, counter = RigLCallback(0.8, method), FLOPsCallback()
    trainer(*[sparse, counter][::order], counts := Counts(sparse), max_epochs=2).fit(kind(), data())
    assert [f_s for _, f_s in counts.batches] == [F_D, *[196] * 15]
    assert counter.report().train == 3 * 8 * (F_D + 15 * 196)
    assert counter.report().train_dense == 3 * 128 * F_D


def test_accumulated_batches_are_looked_at_once(monkeypatch):
    monkeypatch.setattr(Wanting, "looked", [])
    callback = RigLCallback(0.8, Wanting())
    trainer(callback, max_epochs=3, accumulate_grad_batches=4).fit(small(), data())
    assert len(Wanting.looked) == 1
    assert sum(callback.sparsifier.counts.values()) == 98


@pytest.mark.slow
def test_a_compiled_module_is_looked_at_as_it_was_written():
    found = []
    for compiled in (False, True):
        module, callback = Silent(), RigLCallback(0.8, GraSP())
        torch.manual_seed(1)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        started = torch.compile(module, backend="aot_eager") if compiled else module
        trainer(callback, max_steps=1, max_epochs=1).fit(started, data())
        found.append(callback.masks)
    assert equal(*found)


def test_other_methods_do_without():
    callback = RigLCallback(0.8)
    trainer(callback, max_steps=1, max_epochs=1).fit(module := small(), data())
    first_look(None, module, None, 0, callback.sparsifier)
