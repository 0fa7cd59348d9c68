"""RigL-SG: RigL, with connections moving to the layers whose active weights have the largest gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.averages import mean_magnitude
from lightning_rigl.topology.redistribution import redistributed


@dataclass(frozen=True)
class RigLSG(Method):
    """RigL with redistribution by the sparse gradient.

    Drops the smallest |w|, ceil(rate x active) of each layer, and grows as many in total, shared between the
    layers by the mean |dL/dw| of their active connections and placed at the largest |dL/dw|. Shares have the
    rules of `SNFSOriginal`; the total over the layers is the same after each update, and a layer keeps at
    least one connection. As layers change their density, so does the cost of a step.

    Reference:
        Sundar and Dwaraknath, *[Reproducibility Report] Rigging the Lottery*, ML Reproducibility Challenge
        2020, arXiv:2103.15767: it can bridge the gap between uniform and ERK masks, for more FLOPs.

    Example:
        >>> RigLSG().gradient, RigLSG().scope
        ('at_updates', 'model')
    """

    gradient = "at_updates"
    scope = "model"

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop by layer, grow the total by mean |dL/dw| over the active connections."""
        importance = [mean_magnitude(layer.dense_grad(), layer.mask) for layer in layers]
        active, sizes = [layer.active for layer in layers], [layer.mask.numel() for layer in layers]
        return redistributed(active, sizes, importance, moment.fraction)

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|dL/dw|."""
        return layer.dense_grad().abs()
