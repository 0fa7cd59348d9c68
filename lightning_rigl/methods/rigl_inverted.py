"""RigL inverted: a control that grows where the gradient is smallest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method


@dataclass(frozen=True)
class RigLInverted(Method):
    """RigL with its growth turned round: if this is no worse, the gradient says nothing about growth.

    Drops the active connections of smallest |w| and grows those of smallest |dL/dw|. A dead input has a
    gradient of zero, so such connections come first, in the order of their index.

    Reference:
        Evci et al., *Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win*, AAAI 2022,
        arXiv:2010.03533.

    Example:
        >>> RigLInverted().gradient
        'at_updates'
    """

    gradient = "at_updates"

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """-|dL/dw|."""
        return -layer.dense_grad().abs()
