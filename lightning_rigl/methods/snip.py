"""SNIP: prune once, before training, by connection sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.overall import drops
from lightning_rigl.topology.schedules import UpdateSchedule

# One update, in place of step 0. It can wait ten steps for finite gradients, as a loss scaler may need some.
_ONCE = UpdateSchedule(every=10, drop_fraction=0.0, begin=0, end=10)


@dataclass(frozen=True)
class SNIP(Method):
    """Single-shot network pruning, each layer to its own count.

    The model is dense in the first step, which makes no change of the weights: it drops the connections of
    smallest |w dL/dw|. The gradient is that of an optimizer step, so that accumulated batches and all
    processes have their say. Each layer keeps what the distribution gives it, as in the RigL paper; a layer
    that has no gradient in this step stays as it is.

    Reference:
        Lee et al., *SNIP: Single-shot Network Pruning based on Connection Sensitivity*, ICLR 2019,
        arXiv:1810.02340.

    Example:
        >>> SNIP().gradient, SNIP().starts_dense
        ('at_updates', True)
    """

    gradient = "at_updates"
    starts_dense = True
    schedule = _ONCE

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop down to the count of each layer; grow nothing."""
        return [(max(layer.active - layer.target, 0), 0) for layer in layers]

    def drop_score(self, layer: Connections) -> Tensor:
        """|w dL/dw|."""
        return (layer.weight * layer.dense_grad()).abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself; nothing grows."""
        return layer.mask.float()


@dataclass(frozen=True)
class SNIPGlobal(Method):
    """Single-shot network pruning as its authors do it: one ranking of all layers.

    As `SNIP`, but the connections of largest |w dL/dw| of the whole model stay: the distribution decides how
    many there are, not where. At high sparsity a layer may lose all its connections, after which nothing
    flows through it and the model cannot learn; look at ``summary()``, or take `SNIP`.

    Reference:
        Lee et al., ICLR 2019, arXiv:1810.02340, algorithm 1.

    Example:
        >>> SNIPGlobal().scope
        'model'
    """

    gradient = "at_updates"
    starts_dense = True
    scope = "model"
    schedule = _ONCE

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop down to the count of all layers together; grow nothing."""
        target = sum(layer.target for layer in layers)
        lost = drops([self.drop_score(x) for x in layers], [x.mask for x in layers], target)
        return [(each, 0) for each in lost]

    def drop_score(self, layer: Connections) -> Tensor:
        """|w dL/dw|."""
        return (layer.weight * layer.dense_grad()).abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself; nothing grows."""
        return layer.mask.float()
