"""Copies of modules and tensors that have shapes but no values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def meta_copy(module: M, memo: Mapping[int, Any] | None = None) -> M:
    """A copy of a module whose tensors have shapes but no values: no weight is copied.

    Ties between parameters and ``requires_grad`` are kept; the original is not touched.

    Args:
        module: any module.
        memo: what to put in place of some objects, by ``id``, as for `copy.deepcopy`.

    Raises:
        Exception: whatever `copy.deepcopy` raises for an attribute that cannot be copied.

    Example:
        >>> meta_copy(nn.Linear(3, 2)).weight
        Parameter containing:
        tensor(..., device='meta', size=(2, 3), requires_grad=True)
    """
    attributes = (value for m in module.modules() for value in vars(m).values())
    tensors = (*module.parameters(), *module.buffers(), *(a for a in attributes if isinstance(a, Tensor)))
    return copy.deepcopy(module, {**(memo or {}), **{id(t): to_meta(t) for t in tensors}})


def to_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same type, shape and ``requires_grad`` without values."""
    meta = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, tensor.requires_grad)
    return meta.requires_grad_(tensor.requires_grad)
