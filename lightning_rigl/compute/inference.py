"""Operators of torch for inference: a linear layer, and a convolution with kernels of one pixel.

``lightning_rigl::linear`` and ``lightning_rigl::conv1x1`` take the compressed rows of a weight W of shape
(outputs, inputs): ``values`` float32 and ``columns`` uint16 or int32, of shape (connections,), and ``starts``
int32 of shape (outputs + 1,). ``linear_with_gradient`` and ``conv1x1_with_gradient`` are the same and give
the gradient of their input, by a dense product (asking every time whether to costs more than a small
product); that of the weight is what `lightning_rigl.compute.linear` is for. ``lightning_rigl::dense`` writes
W out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_rigl.compute.backends import NativeBackend, TorchBackend
from lightning_rigl.compute.operators import backend_of
from lightning_rigl.kernels import product_calls

_PRODUCT = "(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias, int inputs, str backend)"
_DENSE = "(Tensor values, Tensor starts, Tensor columns, int inputs)"
_LIBRARY: Any = torch.library.Library("lightning_rigl", "FRAGMENT")  # type: ignore[no-untyped-call]


def linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None, inputs: int, backend: str
) -> Tensor:
    """X W^T + b of shape (..., outputs), of x (..., inputs).

    Raises:
        TypeError: ``x`` or the weight is not float32.
        ValueError: it has another number of inputs.
    """
    _check(x, values, -1, inputs)
    shape = (*x.shape[:-1], len(starts) - 1)
    flat = x if x.dim() == 2 else x.reshape(math.prod(shape[:-1]), inputs)
    kernels = backend_of(backend)
    if not _finite(x):  # a dense product makes nan of the zeros, too
        y = torch.nn.functional.linear(flat, dense(values, starts, columns, inputs), bias)
    elif isinstance(kernels, NativeBackend):
        y = product_calls.linear(kernels.library, flat, starts, columns, values, bias)
    elif len(flat) == 1:  # a product with a vector is three times as fast as one with a matrix
        y = (_compressed(values, starts, columns, inputs) @ flat[0]).unsqueeze(0)
        y = y if bias is None else y.add_(bias)
    else:
        y = TorchBackend.product(flat, values, starts, columns, bias)
    return y if x.dim() == 2 else y.view(shape)


def conv1x1(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None, inputs: int, backend: str
) -> Tensor:
    """W times the channels of each pixel, plus b: (images, outputs, ...) of x (images, inputs, ...).

    Raises:
        TypeError: ``x`` or the weight is not float32.
        ValueError: it has another number of channels.
    """
    _check(x, values, 1, inputs)
    shape = (len(x), len(starts) - 1, *x.shape[2:])
    if not x.numel():
        return x.new_empty(shape)  # no image or no pixel
    planes = x.reshape(len(x), inputs, -1)
    kernels = backend_of(backend)
    if not _finite(x):
        y = dense(values, starts, columns, inputs) @ planes
    elif isinstance(kernels, NativeBackend):
        return product_calls.conv1x1(kernels.library, planes, starts, columns, values, bias).view(shape)
    else:
        weight = _compressed(values, starts, columns, inputs)
        y = torch.stack([weight @ image for image in planes])
    return (y if bias is None else y.add_(bias[:, None])).view(shape)


def dense(values: Tensor, starts: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """W of shape (outputs, inputs), zeros included."""
    weight = values.new_zeros(len(starts) - 1, inputs)
    rows = torch.repeat_interleave(torch.arange(len(weight), device=starts.device), starts.diff())
    weight[rows, columns.to(torch.int64)] = values
    return weight


def _compressed(values: Tensor, starts: Tensor, columns: Tensor, inputs: int) -> Tensor:
    size = (len(starts) - 1, inputs)
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def _check(x: Tensor, values: Tensor, place: int, inputs: int) -> None:
    if values.dtype != torch.float32:
        raise TypeError(
            f"the layer is {values.dtype}, and sparse products are float32: take it back with .float(), or "
            "convert the dense model and take that"
        )
    if x.dtype != torch.float32:
        raise TypeError(
            f"x is {x.dtype}; sparse products are float32: give x.float(), or take the dense model"
        )
    if x.dim() <= max(place, 0) or x.shape[place] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, and the layer {inputs} inputs at dimension {place}")


def _finite(x: Tensor) -> bool:
    return math.isfinite(x.sum().item())


def _linear_shape(x: Tensor, values: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], starts.shape[0] - 1)


def _conv1x1_shape(x: Tensor, values: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], starts.shape[0] - 1, *x.shape[2:])


def _dense_shape(values: Tensor, starts: Tensor, columns: Tensor, inputs: int) -> Tensor:
    return values.new_empty(starts.shape[0] - 1, inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, starts, columns, _, ctx.inputs, _ = inputs
    ctx.save_for_backward(values, starts, columns)


def _weight(ctx: Any) -> Tensor:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "the products of inference give the gradient of their input only, and their weight or bias asks "
            "for one; train the dense model, with RigLCallback(compute=...) if it is to be fast"
        )
    return torch.ops.lightning_rigl.dense(*ctx.saved_tensors, ctx.inputs)  # type: ignore[no-any-return]


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad @ _weight(ctx), *[None] * 6


def _conv1x1_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = _weight(ctx).t() @ grad.flatten(2)
    return dx.view(grad.shape[0], ctx.inputs, *grad.shape[2:]), *[None] * 6


def _linear_flops(x: Any, values: Any, *rest: Any, **named: Any) -> int:
    return 2 * int(math.prod(x[:-1])) * int(values[0])


def _conv1x1_flops(x: Any, values: Any, *rest: Any, **named: Any) -> int:
    return 2 * int(x[0] * math.prod(x[2:])) * int(values[0])


def _register(name: str, schema: str, kernel: Any, shape: Any) -> None:
    _LIBRARY.define(f"{name}{schema} -> Tensor")
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"lightning_rigl::{name}", shape, lib=_LIBRARY)


def _register_product(name: str, kernel: Any, shape: Any, gradients: Any, flops: Any) -> None:
    twin = f"{name}_with_gradient"
    for own in (name, twin):
        _register(own, _PRODUCT, kernel, shape)
        register_flop_formula(getattr(torch.ops.lightning_rigl, own))(flops)
    torch.library.register_autograd(f"lightning_rigl::{twin}", gradients, setup_context=_save, lib=_LIBRARY)


_register_product("linear", linear, _linear_shape, _linear_gradients, _linear_flops)
_register_product("conv1x1", conv1x1, _conv1x1_shape, _conv1x1_gradients, _conv1x1_flops)
_register("dense", _DENSE, dense, _dense_shape)
