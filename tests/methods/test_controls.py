"""The controls of a method, as recipes: a random mask, and its mask with weights drawn anew."""

import lightning.pytorch as pl
import torch

from lightning_rigl import ERK, RigLCallback, UpdateSchedule
from tests.callbacks.problems import data, small, trainer

SCHEDULE = UpdateSchedule(every=3, end=12)


def test_a_random_mask_of_the_same_counts():
    """``method="static"``: what does the choice of the connections give beyond their number?"""
    pruned, control = RigLCallback(0.8, "snip"), RigLCallback(0.8, "static")
    for callback in (pruned, control):
        trainer(callback, max_epochs=1).fit(small(), data())
    assert control.sparsifier.counts == pruned.sparsifier.counts
    shapes = {name: mask.shape for name, mask in pruned.masks.items()}
    assert control.sparsifier.counts == ERK().counts(shapes, 0.8)
    for name, mask in control.masks.items():
        assert not torch.equal(mask, pruned.masks[name])


def test_the_mask_with_weights_drawn_anew(tmp_path):
    """Masks by ``init``, a model of another seed: what do these weights give to this mask?"""
    found = RigLCallback(0.8, "rigl", schedule=SCHEDULE)
    trainer(found, max_epochs=2).fit(small(), data())
    torch.save(found.masks, tmp_path / "masks.pt")

    again, module = RigLCallback(method="static", init=str(tmp_path / "masks.pt")), small(seed=1)
    drawn = {name: module.get_parameter(name).detach().clone() for name in found.masks}
    trainer(again, First(drawn, found.masks), max_epochs=2).fit(module, data())
    for name, mask in found.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert (module.get_parameter(name)[~mask] == 0).all()
        assert not torch.equal(drawn[name], small().get_parameter(name))


class First(pl.Callback):
    """Sees the weights of the first step."""

    def __init__(self, drawn, masks):
        self.drawn, self.masks = drawn, masks

    def on_train_start(self, trainer, module):
        for name, mask in self.masks.items():
            assert torch.equal(module.get_parameter(name), self.drawn[name] * mask)
