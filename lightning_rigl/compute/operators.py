"""Operators of torch, so that compilers, exporters and FLOP counters see sparse products.

``lightning_rigl::linear_forward`` and ``linear_backward`` are the passes of a layer whose weight is a dense
parameter; `lightning_rigl.compute.inference` has those of inference. They know shapes on meta tensors, and
count 2 FLOPs for each connection and sample.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from lightning_rigl.compute.backends import Backend, TorchBackend, native
from lightning_rigl.compute.structure import Structure

_LIBRARY: Any = torch.library.Library("lightning_rigl", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor[] indices, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_backward(Tensor grad, Tensor kept, Tensor values, Tensor[] indices, bool of_x, "
    "bool of_weight, Tensor(a!)? into, str backend) -> (Tensor, Tensor)"
)


@cache
def backend_of(name: str) -> Backend:
    """``torch`` or ``native``.

    Raises:
        RuntimeError: the native kernels cannot be had here.
    """
    with warnings.catch_warnings():  # said once a process: compressed rows are a beta feature
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.eye(1).to_sparse_csr()
    if name == "torch":
        return TorchBackend()
    found = native()
    if found is None:
        raise RuntimeError("the native kernels were asked for, and cannot be had here; use the torch backend")
    return found


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a dense W: X W^T + b; X as the backward pass wants it, and the values of W."""
    y, kept, values = backend_of(backend).linear_forward(x, weight, bias, Structure(*indices))
    if y is None:
        y = linear(x, weight, bias)
    return y, kept, values


def linear_backward(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    indices: list[Tensor],
    of_x: bool,
    of_weight: bool,
    into: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of X (batch, inputs), and of the connections; empty where not asked for or written into."""
    s, empty = Structure(*indices), grad.new_empty(0)
    dx, dvalues = backend_of(backend).linear_backward(grad, kept, values, s, (of_x, of_weight), into)
    if of_x and dx is None:
        dx = grad @ _dense(values, s.starts, s.columns, s.inputs)
    return empty if dx is None else dx, empty if dvalues is None else dvalues


def _dense(values: Tensor, starts: Tensor, columns: Tensor, inputs: int) -> Tensor:
    size = (len(starts) - 1, inputs)
    columns = columns.to(torch.int32)
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False).to_dense()


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    turned = backend == "torch"
    kept = x.new_empty(x.shape[::-1]) if turned else x.new_empty(-(-x.shape[0] // 32), x.shape[1], 32)
    return x.new_empty(x.shape[0], weight.shape[0]), kept, weight.new_empty(indices[1].shape)


def _backward_shapes(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    indices: list[Tensor],
    of_x: bool,
    of_weight: bool,
    into: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    compact = of_weight and into is None
    inputs = indices[2].shape[0] - 1
    dx = grad.new_empty(grad.shape[0], inputs) if of_x else grad.new_empty(0)
    return dx, values.new_empty(len(values) if compact else 0)


for _name, _run, _shape in (
    ("linear_forward", linear_forward, _forward_shapes),
    ("linear_backward", linear_backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"lightning_rigl::{_name}", _shape, lib=_LIBRARY)


@register_flop_formula(torch.ops.lightning_rigl.linear_forward)
def _forward_flops(x: Any, weight: Any, bias: Any, indices: Any, *rest: Any, **named: Any) -> int:
    return 2 * int(x[0]) * int(indices[1][0])


@register_flop_formula(torch.ops.lightning_rigl.linear_backward)
def _backward_flops(
    grad: Any, kept: Any, values: Any, indices: Any, of_x: bool, of_weight: bool, *rest: Any, **named: Any
) -> int:
    return 2 * int(grad[0]) * int(values[0]) * (int(of_x) + int(of_weight))
