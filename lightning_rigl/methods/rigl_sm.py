"""RigL-SM: RigL, with connections moving to the layers whose active weights have the largest momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.averages import check_beta, mean_magnitude, moving_average
from lightning_rigl.topology.redistribution import redistributed


@dataclass(frozen=True)
class RigLSM(Method):
    """RigL with redistribution by the sparse momentum.

    Drops the smallest |w|, ceil(rate x active) of each layer, and grows as many in total, shared between the
    layers by the mean |m| of their active connections and placed at the largest |dL/dw|. Shares have the
    rules of `SNFSOriginal`; the total over the layers is the same after each update, and a layer keeps at
    least one connection.

    m <- b m + (1 - b) g is an average of the gradients of active connections only: it is zero elsewhere, and
    begins at zero with a new connection. So the dense gradient is needed at updates only, as by RigL. Every
    step's gradient is taken in, that of the update too. As layers change their density, so does the cost of
    a step.

    Args:
        momentum: b, in [0, 1).

    Raises:
        ValueError: a momentum out of range.

    Reference:
        Sundar and Dwaraknath, *[Reproducibility Report] Rigging the Lottery*, ML Reproducibility Challenge
        2020, arXiv:2103.15767: it can bridge the gap between uniform and ERK masks, for more FLOPs.

    Example:
        >>> RigLSM().gradient, RigLSM().scope
        ('at_updates', 'model')
    """

    momentum: float = 0.9

    gradient = "at_updates"
    scope = "model"

    def __post_init__(self) -> None:
        check_beta(self.momentum, "riglsm")

    def observe(self, layer: Connections, moment: Moment) -> None:
        """Take the gradient of active connections into the average; forget what is not active any more."""
        if layer.grad is not None:
            seen = layer.grad.masked_fill(~layer.mask, 0)
            average = moving_average(layer.notes.get("momentum"), seen, self.momentum)
            layer.notes["momentum"] = average.masked_fill(~layer.mask, 0)

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop by layer, grow the total by mean |m| over the active connections."""
        importance = [mean_magnitude(layer.notes.get("momentum"), layer.mask) for layer in layers]
        active, sizes = [layer.active for layer in layers], [layer.mask.numel() for layer in layers]
        return redistributed(active, sizes, importance, moment.fraction)

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|dL/dw|."""
        return layer.dense_grad().abs()
