"""Whether two forms of a model compute the same, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def compare(expected: Any, got: Any) -> tuple[float, bool]:
    """The largest difference of two outputs, and whether it is rounding.

    Rounding is a difference of the square root of the precision, relative to the largest value of a tensor;
    nan must be where nan is expected, and integers must be equal.

    Example:
        >>> compare(torch.tensor([1.0, 100.0]), torch.tensor([1.01, 100.0]))[1]
        True
        >>> compare(torch.tensor([1.0, 2.0]), torch.tensor([1.01, 2.0]))[1]
        False
    """
    pairs = [tree_leaves(outputs) for outputs in (expected, got)]
    if len(pairs[0]) != len(pairs[1]):
        return float("inf"), False
    each = [_compare(a, b) for a, b in zip(*pairs, strict=True)]
    return max((error for error, _ in each), default=0.0), all(right for _, right in each)


def _compare(a: Any, b: Any) -> tuple[float, bool]:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0, isinstance(a, Tensor) == isinstance(b, Tensor)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), False
    if not a.numel():
        return 0.0, True
    if not a.is_floating_point() and not a.is_complex():
        return float((a != b).any()), a.equal(b)
    error = float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0).max())
    precision = torch.finfo(a.dtype).eps
    if a.is_cuda and a.dtype == torch.float32:
        precision = 2.0**-10  # of TF32
    size = float(torch.where(a.isfinite(), a.abs(), 0.0).max())
    return error, error <= precision**0.5 * size and a.isnan().equal(b.isnan())
