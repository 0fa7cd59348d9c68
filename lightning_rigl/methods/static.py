"""Static: the first mask stays."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method


@dataclass(frozen=True)
class Static(Method):
    """A fixed mask: the control that every dynamic method is compared with.

    It never updates: it has no schedule of its own, and one that is given has no effect.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, section 4.

    Example:
        >>> print(Static().schedule)
        None
    """

    schedule = None

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself: what was dropped comes back, so that an update would change nothing."""
        return layer.mask.float()
