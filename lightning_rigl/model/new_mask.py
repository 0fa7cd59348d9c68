"""One layer, one update: scores asked of the method, counted and chosen by the pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method
from lightning_rigl.topology.patterns import Pattern


def new_mask(
    weight: Tensor,
    mask: Tensor,
    grad: Tensor | None,
    count: int,
    method: Method,
    pattern: Pattern,
    generator: torch.Generator,
) -> Tensor:
    """The mask after dropping and growing ``count`` connections. Changes nothing.

    A layer that has no gradient in this step, where the method needs one, keeps its mask. Scores are made of
    values of at least 32 bits.

    Raises:
        ValueError: a score of the method has another shape than the weight.
    """
    if grad is None and method.gradient != "never":
        return mask
    layer = Connections(_wide(weight), mask, None if grad is None else _wide(grad), generator)
    kept = pattern.drop(_checked(method.drop_score(layer), layer, method), mask, count)
    return pattern.grow(_checked(method.grow_score(layer), layer, method), kept, count)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.element_size() < 4 else values


def _checked(scores: Tensor, layer: Connections, method: Method) -> Tensor:
    shape = tuple(layer.weight.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(f"method {type(method).__name__}: a score has the weight's shape {shape}, got {got}")
    return scores
