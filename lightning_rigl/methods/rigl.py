"""RigL: drop the smallest weights, grow where the dense gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method


@dataclass(frozen=True)
class RigL(Method):
    """Rigging the lottery.

    Drops the active connections of smallest |w| and grows those of largest |dL/dw|, taken from the dense
    gradient of the very step that the update replaces. A connection just dropped may grow again; it then
    keeps its value.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134.

    Example:
        >>> RigL().gradient
        'at_updates'
    """

    gradient = "at_updates"

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|dL/dw|."""
        return layer.dense_grad().abs()
