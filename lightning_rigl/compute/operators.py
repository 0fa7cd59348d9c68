"""Operators of torch, so that compilers, exporters and FLOP counters see sparse products.

``lightning_rigl::spmm`` is the product of inference; ``spmm_forward`` and ``spmm_backward`` are those of a
training step. They know shapes on meta tensors, and count 2 FLOPs for each connection and sample.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_rigl.compute.backends import Backend, TorchBackend, native
from lightning_rigl.compute.structure import Structure

_MATRIX = "Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias, str backend"
_LIBRARY: Any = torch.library.Library("lightning_rigl", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"spmm({_MATRIX}) -> Tensor")
_LIBRARY.define(f"spmm_forward({_MATRIX}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "spmm_backward(Tensor grad, Tensor kept, Tensor values, Tensor starts, Tensor columns, Tensor starts_t, "
    "Tensor columns_t, Tensor permutation, bool of_input, bool of_weight, str backend) -> (Tensor, Tensor)"
)


@cache
def backend_of(name: str) -> Backend:
    """``torch`` or ``native``.

    Raises:
        RuntimeError: the native kernels cannot be had here.
    """
    if name == "torch":
        with warnings.catch_warnings():  # said once a process: compressed rows are a beta feature
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            torch.eye(1).to_sparse_csr()
        return TorchBackend()
    found = native()
    if found is None:
        raise RuntimeError("the native kernels were asked for, and cannot be had here; use the torch backend")
    return found


def spmm(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    """X W^T + b of shape (batch, outputs), of X (batch, inputs) and compressed rows of W."""
    return spmm_forward(x, values, starts, columns, bias, backend)[0]


def spmm_forward(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The product, and what the backward pass needs of X; empty if that is X itself."""
    if not _finite(x):  # a dense product makes nan of the zeros, too
        return torch.nn.functional.linear(x, _dense(values, starts, columns, x.shape[1]), bias), x.new_empty(
            0
        )
    y, kept = backend_of(backend).forward(x, values, starts, columns, bias)
    return y, x.new_empty(0) if kept is x else kept


def spmm_backward(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    starts_t: Tensor,
    columns_t: Tensor,
    permutation: Tensor,
    of_input: bool,
    of_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of X, of shape (batch, inputs), and of the connections; empty where not asked for."""
    structure = Structure(starts, columns, starts_t, columns_t, permutation)
    finite = _finite(grad)
    found = backend_of(backend).backward(grad, kept, values, structure, (of_input and finite, of_weight))
    if of_input and not finite:
        return grad @ _dense(values, starts, columns, structure.inputs), found[1]
    return found


def _finite(x: Tensor) -> bool:
    return bool(x.sum().isfinite())


def _dense(values: Tensor, starts: Tensor, columns: Tensor, inputs: int) -> Tensor:
    size = (len(starts) - 1, inputs)
    columns = columns.to(torch.int32)
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False).to_dense()


_LIBRARY.impl("spmm", spmm, "CPU")
_LIBRARY.impl("spmm_forward", spmm_forward, "CPU")
_LIBRARY.impl("spmm_backward", spmm_backward, "CPU")


def _spmm_shape(x: Tensor, values: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], starts.shape[0] - 1)


def _spmm_forward_shapes(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    panels = x.new_empty(0) if backend == "torch" else x.new_empty(-(-x.shape[0] // 32), x.shape[1], 32)
    return x.new_empty(x.shape[0], starts.shape[0] - 1), panels


def _spmm_backward_shapes(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    starts_t: Tensor,
    columns_t: Tensor,
    permutation: Tensor,
    of_input: bool,
    of_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    empty = grad.new_empty(0)
    dx = grad.new_empty(grad.shape[0], starts_t.shape[0] - 1) if of_input else empty
    return dx, torch.empty_like(values) if of_weight else empty.clone()


torch.library.register_fake("lightning_rigl::spmm", _spmm_shape, lib=_LIBRARY)
torch.library.register_fake("lightning_rigl::spmm_forward", _spmm_forward_shapes, lib=_LIBRARY)
torch.library.register_fake("lightning_rigl::spmm_backward", _spmm_backward_shapes, lib=_LIBRARY)


@register_flop_formula([torch.ops.lightning_rigl.spmm, torch.ops.lightning_rigl.spmm_forward])
def _spmm_flops(x: Any, values: Any, *rest: Any, **named: Any) -> int:
    return 2 * int(x[0]) * int(values[0])


@register_flop_formula(torch.ops.lightning_rigl.spmm_backward)
def _spmm_backward_flops(grad: Any, kept: Any, values: Any, *rest: Any, **named: Any) -> int:
    of_input, of_weight = rest[-3:-1] if len(rest) == 8 else rest[5:7]
    return 2 * int(grad[0]) * int(values[0]) * (int(of_input) + int(of_weight))
