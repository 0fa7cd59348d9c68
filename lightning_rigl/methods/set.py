"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method


@dataclass(frozen=True)
class SET(Method):
    """Sparse evolutionary training, with the step-based updates that the RigL paper compares it by.

    Drops the active connections of smallest |w| and grows uniformly at random; it never needs the dense
    gradient, so its cost stays proportional to the density.

    Reference:
        Mocanu et al., *Scalable training of artificial neural networks with adaptive sparse connectivity
        inspired by network science*, Nature Communications 2018, arXiv:1707.04780.

    Example:
        >>> SET().gradient
        'never'
    """

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """Uniform random numbers."""
        return layer.random()
