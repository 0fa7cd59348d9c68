"""Gradual magnitude pruning: from dense to sparse along a cubic curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.overall import drops
from lightning_rigl.topology.schedules import UpdateSchedule

# The RigL paper's proportions on ImageNet: steps 10,000 to 25,000 of 32,000. Its update every 1,000 steps is
# for long runs; every 10 leaves a run of 100 steps five updates. There is no drop fraction.
_SCHEDULE = UpdateSchedule(every=10, drop_fraction=0.0, begin=10 / 32, end=25 / 32, policy="after_step")


@dataclass(frozen=True)
class Gradual(Method):
    """Gradual magnitude pruning, each layer to its own count.

    Training starts dense. Each update drops the connections of smallest |w|, so that the sparsity of a layer
    is s_t = s_f (1 - (1 - p)^3). Here p goes from 0 at the schedule's first update to 1 at its last, when the
    layer has exactly the count that the distribution gives it. Nothing grows. Updates follow the optimizer's
    step, every 10 steps, which suits short runs; a long one can do with fewer: ``UpdateSchedule(every=1000,
    begin=0.3125, end=0.78125, policy="after_step")``. In manual optimization an optimizer that steps less
    often than once a batch may not meet the last update, which is said: give ``begin`` and ``end`` in its
    steps.

    Reference:
        Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*,
        ICLR 2018 workshop, arXiv:1710.01878, equation (1).

    Example:
        >>> tuple(remaining(1000, 100, progress) for progress in (0.0, 0.1, 0.5, 0.9, 1.0))
        (1000, 757, 213, 101, 100)
    """

    starts_dense = True
    schedule = _SCHEDULE

    def planned(self, size: int, target: int, progress: float) -> int:
        """What `remaining` says: the cubic curve."""
        return remaining(size, target, progress)

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop down to the cubic curve of each layer; grow nothing."""
        counts = [remaining(x.mask.numel(), x.target, moment.progress) for x in layers]
        return [(max(x.active - count, 0), 0) for x, count in zip(layers, counts, strict=True)]

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself; nothing grows."""
        return layer.mask.float()


@dataclass(frozen=True)
class GradualGlobal(Method):
    """Gradual magnitude pruning with one threshold for all layers.

    As `Gradual`, but |w| is ranked over all layers together and only the total follows the cubic curve: the
    distribution decides how many connections there are, not where. A layer of small weights may lose all its
    connections, after which nothing flows through it; look at ``summary()``, or exclude such a layer.

    Reference:
        Zhu and Gupta, ICLR 2018 workshop, arXiv:1710.01878; the global ranking is that of Sundar and
        Dwaraknath, *[Reproducibility Report] Rigging the Lottery*, ML Reproducibility Challenge 2020,
        arXiv:2103.15767.

    Example:
        >>> GradualGlobal.scope, GradualGlobal.schedule.policy
        ('model', 'after_step')
    """

    starts_dense = True
    scope = "model"
    schedule = _SCHEDULE

    def planned(self, size: int, target: int, progress: float) -> int:
        """What `remaining` says: each layer as if its curve were its own."""
        return remaining(size, target, progress)

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop down to the cubic curve of all layers together; grow nothing."""
        size, target = sum(x.mask.numel() for x in layers), sum(x.target for x in layers)
        count = remaining(size, target, moment.progress)
        lost = drops([self.drop_score(x) for x in layers], [x.mask for x in layers], count)
        return [(each, 0) for each in lost]

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself; nothing grows."""
        return layer.mask.float()


def remaining(size: int, target: int, progress: float) -> int:
    """Connections that the cubic curve leaves of ``size``: all at progress 0, ``target`` at 1."""
    return size - math.floor((size - target) * (1 - (1 - progress) ** 3))
