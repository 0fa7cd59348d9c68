"""Methods that prune: two processes whose data differ have the same masks, and one with all data has them."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.methods.dnw import DNW
from lightning_rigl.methods.gradual import Gradual, GradualGlobal
from lightning_rigl.methods.grasp import GraSP
from lightning_rigl.methods.snip import SNIP, SNIPGlobal
from lightning_rigl.methods.synflow import SynFlow
from tests.callbacks.problems import Small, data, trainer
from tests.distributed.problems import OwnSeeds, Together, sgd, shares
from tests.methods.pruning import lowest

SCHEDULE = UpdateSchedule(every=5, begin=0.3, end=0.8, policy="after_step")
METHODS = [Gradual(), GradualGlobal(), SNIP(), SNIPGlobal(), GraSP(), SynFlow(), DNW()]


def model():
    torch.manual_seed(0)
    return Small(optimizer=sgd, dtype=torch.float64)


class Scores(pl.Callback):
    """Saves those of the first look."""

    def __init__(self, rigl):
        self.rigl = rigl

    def on_after_backward(self, trainer, module):  # the update forgets them
        if trainer.global_step:
            return
        notes = {name: layer.notes.get("score") for name, layer in self.rigl.sparsifier.layers.items()}
        torch.save(notes, f"scores{trainer.global_rank}.pt")


def fit(file, method, processes):
    """Two epochs of eight batches; what `Together` asserts, on both ranks; (weights, masks after updates)."""
    schedule = SCHEDULE if isinstance(method, (Gradual, GradualGlobal)) else None
    rigl, strategy = RigLCallback(0.8, method, schedule=schedule), "ddp_fork" if processes > 1 else "auto"
    settings = {"devices": processes, "strategy": strategy, "use_distributed_sampler": False}
    callbacks = OwnSeeds(), rigl, Together(rigl, file), Scores(rigl)
    trainer(*callbacks, max_epochs=2, **settings).fit(model(), shares(processes))
    return torch.load(file)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_two_processes(method, tmp_path):
    weights, history = fit(tmp_path / "two.pt", method, processes=2)
    scores = torch.load("scores0.pt"), torch.load("scores1.pt")
    alone, expected = fit(tmp_path / "one.pt", method, processes=1)
    assert len(history) == {Gradual(): 2, GradualGlobal(): 2, DNW(): 0}.get(method, 1)
    if method == GraSP():
        found, masks = averaged_grasp()
        alone, expected = None, [masks]
        for each in scores:
            torch.testing.assert_close(each, found)
    for masks, others in zip(history, expected, strict=True):
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    for a, b in zip(weights, alone or weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def averaged_grasp():
    """The scores on the first four samples and those on the next four, averaged."""
    x, y = next(iter(data(dtype=torch.float64)))
    found = []
    for share in (slice(4), slice(4, 8)):
        sparsifier = Sparsifier(model(), 0.8, GraSP())
        sparsifier.look(lambda twin, s=share: nn.functional.cross_entropy(twin(x[s]), y[s]))
        found.append({name: layer.notes["score"] for name, layer in sparsifier.layers.items()})
    mean = {name: (score + found[1][name]) / 2 for name, score in found[0].items()}
    return mean, lowest(mean, {name: torch.ones_like(s).bool() for name, s in mean.items()}, 480 - 98)
