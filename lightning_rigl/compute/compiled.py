"""The product of a dense parameter as one operator with gradients, for `torch.compile`.

Its weight gradient is a new dense tensor, zero at inactive connections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_rigl.compute.operators import backend_of, linear_backward, linear_forward
from lightning_rigl.compute.structure import Structure


@torch.library.custom_op("lightning_rigl::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: list[Tensor],
    dense_gradient: bool,
    backend: str,
) -> Tensor:
    """The product y = x W^T + b, of x (batch, inputs) and a weight that is zero elsewhere than there."""
    return linear_forward(x, weight, bias, indices, backend)[0]


@sparse_linear.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("lightning_rigl::sparse_linear_backward", mutates_args=())
def sparse_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: list[Tensor],
    dense_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; the latter zero where inactive, unless ``dense_gradient``."""
    _, kept, values = backend_of(backend).linear_forward(x, weight, None, Structure(*indices))
    dweight = grad.t() @ x if dense_gradient else torch.zeros_like(weight)
    into = None if dense_gradient else dweight
    dx, _ = linear_backward(grad, kept, values, indices, True, not dense_gradient, into, backend)
    return dx, dweight


@sparse_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, indices, dense_gradient, backend = inputs
    ctx.save_for_backward(x, weight, *indices)
    ctx.dense_gradient, ctx.backend = dense_gradient, backend


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *indices = ctx.saved_tensors
    dx, dweight = sparse_linear_backward(grad, x, weight, indices, ctx.dense_gradient, ctx.backend)
    dbias = grad.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias, [None] * len(indices), None, None


sparse_linear.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.lightning_rigl.sparse_linear)
def _forward_flops(x: Any, weight: Any, bias: Any, indices: Any, *rest: Any, **named: Any) -> int:
    return 2 * int(x[0]) * int(indices[1][0])


@register_flop_formula(torch.ops.lightning_rigl.sparse_linear_backward)
def _backward_flops(
    grad: Any, x: Any, weight: Any, indices: Any, dense_gradient: bool, *rest: Any, **named: Any
) -> int:
    count = int(indices[1][0])
    return 2 * int(grad[0]) * (count + (int(weight[0]) * int(weight[1]) if dense_gradient else count))
