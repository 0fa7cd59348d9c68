"""DSR: one adaptive threshold drops in all layers, which grow in proportion to what they have left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.redistribution import place
from lightning_rigl.topology.schedules import UpdateSchedule


@dataclass(frozen=True)
class DSR(Method):
    """Dynamic sparse reparameterization.

    At an update every active connection with |w| < H is dropped, in all layers, except that the largest of a
    layer stays. As many grow again: shared between the layers in proportion to the connections they have
    left, in rounds until all are placed, and at random in a layer. One that was dropped a moment ago grows
    only where no other place is left in any layer. The total over the layers is the same after each update.

    H is one number for an optimizer's layers, halved if more than 1.1 N connections were dropped and doubled
    if fewer than 0.9 N were. N, a fixed number in the paper, is the schedule's drop fraction of all
    connections: the default of 0.14, constant, is near its 20,000 for WRN-28-2 at 90 % sparsity. So the
    fraction is a target here and not exact. As in the paper the update follows the step, and rewiring stops
    at 95 % of training.

    Args:
        threshold: H at the first update, above 0.

    Raises:
        ValueError: a threshold out of range.

    Reference:
        Mostafa and Wang, *Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic
        Sparse Reparameterization*, ICML 2019, arXiv:1902.05967.

    Example:
        >>> DSR().gradient, DSR().schedule.drop_fraction
        ('never', 0.14)
    """

    threshold: float = 1e-3

    scope = "model"
    schedule = UpdateSchedule(every=100, drop_fraction=0.14, decay="constant", end=0.95, policy="after_step")

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"method dsr, threshold: a number, got {self.threshold!r}")
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"method dsr, threshold: a number above 0, got {self.threshold!r}")

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """All below H, and as many in proportion to what is left; then adapt H."""
        now = moment.numbers.setdefault("threshold", float(self.threshold))
        active = [layer.active for layer in layers]
        below = [int(((layer.weight.abs() < now) & layer.mask).count_nonzero()) for layer in layers]
        dropped = [min(count, max(most - 1, 0)) for count, most in zip(below, active, strict=True)]
        left = [before - gone for before, gone in zip(active, dropped, strict=True)]
        free = [layer.mask.numel() - count for layer, count in zip(layers, active, strict=True)]
        total, wanted = sum(dropped), moment.fraction * sum(active)
        if total > 1.1 * wanted:
            moment.numbers["threshold"] = now / 2
        elif total < 0.9 * wanted:
            moment.numbers["threshold"] = now * 2
        return list(zip(dropped, place(total, left, free, spare=dropped), strict=True))

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """Uniform random numbers, below all others where a connection was active until now."""
        return layer.random() - layer.mask.float()
