"""What a method answers, refused in words where it cannot be."""

from __future__ import annotations

from operator import index

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method
from lightning_rigl.model.sparse_layer import SparseLayer


def checked_counts(pair: object, layer: SparseLayer, method: Method) -> tuple[int, int]:
    """How many connections are dropped and grown: no more than are active, and inactive after that."""
    try:
        dropped, grown = (index(number) for number in pair)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(
            f"{type(method).__name__}.turnover: (dropped, grown) of {layer.name} are two whole numbers, got "
            f"{pair!r}"
        ) from None
    active, size = layer.count, layer.mask.numel()
    if not (0 <= dropped <= active and 0 <= grown <= size - active + dropped):
        raise ValueError(
            f"{type(method).__name__}.turnover: of {active} of {size} connections, {layer.name} cannot drop "
            f"{dropped} and grow {grown}"
        )
    return dropped, grown


def checked_score(scores: Tensor, layer: Connections, method: Method) -> Tensor:
    """A score of each connection."""
    shape = tuple(layer.weight.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(f"method {type(method).__name__}: a score has the weight's shape {shape}, got {got}")
    return scores
