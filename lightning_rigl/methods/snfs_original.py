"""SNFS as published: connections move to the layers whose active weights have the largest momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.averages import check_beta, mean_magnitude, moving_average
from lightning_rigl.topology.redistribution import redistributed
from lightning_rigl.topology.schedules import UpdateSchedule


@dataclass(frozen=True)
class SNFSOriginal(Method):
    """Sparse networks from scratch, with redistribution.

    In each layer the smallest |w| are dropped, ceil(rate x active) of them; all that were dropped grow again,
    shared between the layers by the mean |m| of their active connections, and in a layer at the largest |m|.
    Shares have the original's rules: at most 0.99 of what fits into a layer, the rest spread evenly; a layer
    of sparsity below 0.2 whose share is above 1/L drops at most that sparsity.

    Two things are exact here that the original holds on average: masks begin with their exact count, and
    the total over the layers is the same after each update. Its correction of the growth, by what the total
    is off target, has therefore nothing to correct. A layer keeps at least one connection.

    m is an average of dense gradients, m <- b m + (1 - b) g, at every step. Up to a factor that changes no
    choice it is the buffer of SGD that the original reads, except that weight decay is not part of it.

    The original updates once per epoch. Steps know no epochs: the default is every 100 steps, after the
    step, over all of training, with its rate of 0.5 and a cosine (to 0; theirs ends at 0.005); give ``every``
    the steps of an epoch to be nearer to it.

    Args:
        momentum: b, in [0, 1).

    Raises:
        ValueError: a momentum out of range.

    Reference:
        Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*,
        2019, arXiv:1907.04840.

    Example:
        >>> SNFSOriginal().scope, SNFSOriginal().schedule.drop_fraction
        ('model', 0.5)
    """

    momentum: float = 0.9

    gradient = "every_step"
    scope = "model"
    schedule = UpdateSchedule(every=100, drop_fraction=0.5, end=1.0, policy="after_step")

    def __post_init__(self) -> None:
        check_beta(self.momentum, "snfsoriginal")

    def observe(self, layer: Connections, moment: Moment) -> None:
        """Take the gradient into the average."""
        if layer.grad is not None:
            layer.notes["momentum"] = moving_average(layer.notes.get("momentum"), layer.grad, self.momentum)

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop by layer, grow the total by mean |m| over the active connections."""
        importance = [mean_magnitude(layer.notes.get("momentum"), layer.mask) for layer in layers]
        active, sizes = [layer.active for layer in layers], [layer.mask.numel() for layer in layers]
        return redistributed(active, sizes, importance, moment.fraction)

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|m|."""
        return layer.notes.get("momentum", torch.zeros_like(layer.weight)).abs()
