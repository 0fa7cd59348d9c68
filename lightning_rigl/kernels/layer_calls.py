"""The passes of a sparse linear layer, one call of the native kernels each.

Indices are as in `lightning_rigl.kernels.product_calls`; they come from one mask and are not checked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rigl.kernels import checks
from lightning_rigl.kernels.library import Library, threads


def forward(
    library: Library, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Y = X W^T + b of the connections of a dense W.

    Args:
        library: the kernels.
        x: float32 on the CPU, of shape (batch, inputs) and any strides.
        weight: the same, of shape (outputs, inputs), contiguous.
        bias: shape (outputs,), or None.
        starts: int32 of shape (outputs + 1,).
        columns: uint16 or int32 of shape (connections,).

    Returns:
        Y of shape (batch, outputs), or None if X is not finite; X in panels, and the connections' weights.

    Raises:
        TypeError: a tensor is not float32 or not on the CPU.
        ValueError: a shape does not fit.
    """
    checks.floats("x", x, 2)
    checks.floats("weight", weight, 2)
    (batch, inputs), outputs = x.shape, weight.shape[0]
    if weight.shape[1] != inputs or len(starts) != outputs + 1 or not weight.is_contiguous():
        raise ValueError(
            f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)} and strides "
            f"{weight.stride()}, indices of {len(starts) - 1} rows: the weight must be contiguous, of a row "
            "for each output and a column for each input"
        )
    bias = checks.offsets(bias, outputs)
    panels = x.new_empty(-(-batch // library.panel), inputs, library.panel)
    values, y = x.new_empty(columns.shape), x.new_empty(batch, outputs)
    done = library(
        "lr_linear_forward", "i:pnnnnpppipnppnpi", x.data_ptr(), batch, inputs, x.stride(0), x.stride(1),
        weight.data_ptr(), starts.data_ptr(), columns.data_ptr(), checks.wide(starts, columns),
        checks.address(bias), outputs, values.data_ptr(), panels.data_ptr(), panels.numel(), y.data_ptr(),
        threads(),
    )  # fmt: skip
    return y if done else None, panels, values


def backward(
    library: Library,
    grad: Tensor,
    panels: Tensor,
    values: Tensor,
    indices: Sequence[Tensor],
    needs: tuple[bool, bool],
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of X and of the connections.

    Args:
        library: the kernels.
        grad: of Y, float32 on the CPU, of shape (batch, outputs) and any strides.
        panels: as `forward` gave them.
        values: as `forward` gave them.
        indices: starts, columns, starts_t, columns_t, permutation.
        needs: whether the one of X, and that of the connections, are wanted.
        into: dense, of the weight's shape, contiguous: receives the connections' gradient at their places.

    Returns:
        Of X, of shape (batch, inputs); None if it is not wanted, or the gradient is not finite. Of the
        connections, of shape (connections,); None if it is not wanted or written to ``into``.
    """
    checks.floats("grad", grad, 2)
    starts, columns, starts_t, columns_t, permutation = indices[:5]
    (batch, outputs), inputs = grad.shape, panels.shape[1]
    scratch = grad.new_empty(panels.shape[0], outputs, library.panel)
    dx = grad.new_empty(batch, inputs) if needs[0] else None
    turned = torch.empty_like(values) if needs[0] else None
    compact = torch.empty_like(values) if needs[1] else None
    done = library(
        "lr_linear_backward", "i:pnnnnppnppippipnpnppppi", grad.data_ptr(), batch, outputs, grad.stride(0),
        grad.stride(1), panels.data_ptr(), values.data_ptr(), inputs, starts.data_ptr(), columns.data_ptr(),
        checks.wide(starts, columns), starts_t.data_ptr(), columns_t.data_ptr(),
        checks.wide(starts_t, columns_t), permutation.data_ptr(), values.numel(), scratch.data_ptr(),
        scratch.numel(), checks.address(turned), checks.address(dx), checks.address(compact),
        checks.address(into if needs[1] else None), threads(),
    )  # fmt: skip
    return dx if done else None, compact if into is None else None
