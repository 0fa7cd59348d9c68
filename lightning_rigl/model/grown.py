"""New connections: what they are worth, and what the optimizer remembers of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rigl.methods.base import Connections, Method
from lightning_rigl.model import optimizer_state
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.growth import Growth

INITIAL = "initial"  # the place of the initial values among the notes
AVERAGES = ("momentum_buffer", "exp_avg")  # moving averages of gradients, by torch's names


def refuse_growth(method: Method, growth: Growth) -> None:
    """Refuse what cannot be, or would have no effect.

    Raises:
        TypeError: ``growth`` is no `Growth`.
        ValueError: new connections of a method that makes none, or that are to begin by a gradient that the
            method never reads.
    """
    if not isinstance(growth, Growth):
        raise TypeError(f"growth: expected a Growth, such as Growth('normal'), or None, got {growth!r}")
    if growth != Growth() and not method.grows:
        raise ValueError(
            f"growth={growth} says what new connections are worth, and {type(method).__name__} never makes "
            "one: leave it out, or take a method that grows, such as rigl or set"
        )
    if growth.reads_gradient and method.gradient == "never":
        raise ValueError(
            f"growth={growth} reads the dense gradient, which {type(method).__name__} never does: take "
            "values 'zeros', 'initial', 'normal' or 'uniform' with momentum=0, or a method that reads it"
        )


@dataclass(frozen=True)
class Grown:
    """New connections of a layer: where, their values, and what the average of their gradients starts at."""

    layer: SparseLayer
    where: Tensor
    values: Tensor
    average: Tensor | None

    @torch.no_grad()
    def fill(self) -> None:
        """Give them their values; the layer has its new mask."""
        values = self.values.to(self.layer.parameter.dtype)
        self.layer.parameter.copy_(torch.where(self.where, values, self.layer.parameter))

    @torch.no_grad()
    def remember(self, optimizer: Optimizer) -> None:
        """Start the optimizer's moving average of their gradients; its state is fresh."""
        for key, state in optimizer_state.elementwise(optimizer, self.layer.parameter).items():
            if key in AVERAGES and self.average is not None:
                state.copy_(torch.where(self.where, self.average.to(state.dtype), state))


def grown(layer: SparseLayer, before: Connections, kept: Tensor, mask: Tensor, growth: Growth) -> Grown:
    """The new connections of an update, before it is made.

    Args:
        layer: to be updated.
        before: the same as the method sees it.
        kept: bool, the connections that are not dropped.
        mask: bool, those to come.
        growth: what they are worth.
    """
    where = mask & ~(kept if growth.regrown else before.mask)
    values = growth.new_values(
        before.weight, before.mask, layer.notes.get(INITIAL), before.grad, before.generator
    )
    average = None if before.grad is None or not growth.momentum else growth.momentum * before.grad
    return Grown(layer, where, values, average)
