"""SNFS as in the RigL paper: drop the smallest weights, grow where the average gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.averages import check_beta, moving_average


@dataclass(frozen=True)
class SNFS(Method):
    """Sparse networks from scratch without redistribution, the form that the RigL paper compares with.

    Drops the active connections of smallest |w| and grows those of largest |m|, where
    m <- b m + (1 - b) g is its own moving average of the dense gradients g, from zero. It takes in every
    step's gradient, that of the update too, before the update reads it. The number of connections of each
    layer is constant. The dense gradient is needed at every step: 2 f_S + f_D. A step whose gradient is not
    finite leaves m as it is.

    Args:
        momentum: b, in [0, 1); in the paper's appendix D 0.99 was best and 0, the last gradient alone, as
            good as 0.9.

    Raises:
        ValueError: a momentum out of range.

    Reference:
        Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, 2019, arXiv:1907.04840, as in Evci et al.,
        *Rigging the Lottery*, ICML 2020, arXiv:1911.11134. With redistribution it is `SNFSOriginal`.

    Example:
        >>> SNFS(momentum=0.99).gradient
        'every_step'
    """

    momentum: float = 0.9

    gradient = "every_step"

    def __post_init__(self) -> None:
        check_beta(self.momentum, "snfs")

    def observe(self, layer: Connections, moment: Moment) -> None:
        """Take the gradient into the average."""
        if layer.grad is not None:
            layer.notes["momentum"] = moving_average(layer.notes.get("momentum"), layer.grad, self.momentum)

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|m|."""
        return layer.notes.get("momentum", torch.zeros_like(layer.weight)).abs()
