"""y = W x with W's zeros skipped, and gradients, of a parameter that stays a dense tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from lightning_rigl.compute import crossover
from lightning_rigl.compute.compiled import sparse_linear
from lightning_rigl.compute.operators import backend_of
from lightning_rigl.compute.structure import Structure

_OPS: Any = torch.ops.lightning_rigl
_PROBES = 256  # places of a gradient that are looked at
_BUFFERS = 2  # for gradients; a second one serves micro-batches and a layer that is used twice


class SparseProduct:
    """What one sparse parameter needs for products that skip its zeros.

    Forward pass, input gradient and weight gradient touch the active connections only. The weight gradient
    is a dense tensor like any other, zero at inactive connections; its memory is used again once nobody
    holds it any more.

    Args:
        parameter: float32 on the CPU, of shape (outputs, inputs); inactive weights are zero.
        mask: bool, its shape.
        backend: ``torch`` or ``native``.
        rule: from how many rows of input on the product is sparse; None: always.
    """

    def __init__(
        self, parameter: nn.Parameter, mask: Tensor, backend: str, rule: crossover.Rule | None = None
    ) -> None:
        self.parameter, self.backend, self._rule = parameter, backend, rule
        self.dense_gradient = False  # whether backward passes give the gradient of inactive connections, too
        self.partial = False  # whether one of them has left it out
        self.used = self.missed = False  # whether a product was sparse, or was not and might have been
        self.active_gradient = False  # whether the gradient is a sparse tensor, of active connections
        self.kernels = backend_of(backend)
        self.renew(mask)

    def renew(self, mask: Tensor) -> None:
        """Take another mask; the weights are those of that mask by now."""
        self._mask = mask
        self._structure: Structure | None = None
        self._buffers: list[tuple[Tensor, int]] = []  # zero where inactive, as long as the version is this
        size, count = mask.numel(), int(mask.count_nonzero())
        rows = 1 if self._rule is None else crossover.least_rows(size, count, self._rule)
        self._least = math.inf if rows is None else rows * mask.shape[1]  # numbers of an input
        places = torch.arange(0, size, size // _PROBES | 1, device=mask.device)
        self._probes = places[~mask.view(-1)[places]]
        if rows is not None:
            self._structure = self.kernels.structure(mask)

    @property
    def gains(self) -> bool:
        """Whether the product is sparse from some number of rows on."""
        return self._least < math.inf

    @property
    def structure(self) -> Structure:
        """Where the connections are."""
        if self._structure is None:
            self._structure = self.kernels.structure(self._mask)
        return self._structure

    def compiled(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as an operator that compilers see; its gradient is a tensor of its own."""
        self.used = True
        if not self.dense_gradient:
            self.partial = True
        flat, indices = x.reshape(-1, x.shape[-1]), self.structure.tensors
        y: Tensor = sparse_linear(flat, self.parameter, bias, indices, self.dense_gradient, self.backend)
        return y.view(*x.shape[:-1], y.shape[-1])

    def fits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether this product can be sparse: plain float32 tensors on the CPU, and the weight itself."""
        return (
            x.numel() >= self._least  # first: layers that are always too small are asked nothing more
            and weight is self.parameter
            and x.layout is torch.strided
            and not x.is_nested
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.shape[-1:] == weight.shape[1:]
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        )

    def is_plain(self, x: Tensor) -> bool:
        """Whether x is of its own kind, in no functional transform, forward mode, trace or export."""
        return (
            type(x) in (Tensor, nn.Parameter)
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
            and torch._C._get_tracing_state() is None
            and not torch.onnx.is_in_onnx_export()
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of x of shape (..., inputs) the product, (..., outputs)."""
        self.used = True
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor
        if torch.is_grad_enabled():
            y = _Linear.apply(flat, self.parameter, bias, self)  # type: ignore[no-untyped-call]
        else:  # inside a function a FLOP counter could not tell that gradients are disabled
            y = _OPS.linear_forward(flat, self.parameter, bias, self.structure.tensors, self.backend)[0]
        return y.view(*x.shape[:-1], y.shape[-1])

    def buffer(self) -> Tensor:
        """Memory for a gradient that nobody else holds, zero where inactive; `wrote` knows it."""
        for place, (known, version) in enumerate(self._buffers):
            if _holders(known) == 1:
                if known._version != version:
                    known.zero_()
                    self._buffers[place] = known, known._version
                return known
        new = torch.zeros_like(self.parameter, memory_format=torch.contiguous_format)
        if len(self._buffers) < _BUFFERS:
            self._buffers.append((new, new._version))
        return new

    def written(self, buffer: Tensor) -> Tensor:
        """The gradient in a buffer: an alias, which autograd keeps without a copy."""
        self._buffers = [(b, b._version if b is buffer else version) for b, version in self._buffers]
        return buffer.view_as(buffer)

    def sparse(self, values: Tensor) -> Tensor:
        """A gradient as a sparse tensor of the active connections."""
        s = self.structure
        size = (s.outputs, s.inputs)
        return torch.sparse_coo_tensor(s.indices, values, size, is_coalesced=True, check_invariants=False)

    def wrote(self, grad: Tensor) -> bool:
        """Whether a gradient is what a backward pass gave, unchanged: zero where inactive.

        A change through ``.data`` bumps no version: some inactive places are looked at for one of all.
        """
        return grad.is_sparse or any(
            grad.data_ptr() == buffer.data_ptr()
            and buffer._version == version
            and not grad.view(-1)[self._probes].any()
            for buffer, version in self._buffers
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a layer computes densely


def _holders(tensor: Tensor) -> int:
    """How many tensors use this one's memory."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # less the handle that asks


class _Linear(torch.autograd.Function):
    """The product of a dense parameter whose inactive weights are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: SparseProduct) -> Tensor:
        s: Structure = product.structure
        y: Tensor
        y, kept, values = _OPS.linear_forward(x, weight, bias, s.tensors, product.backend)
        # no more than a dense product keeps: what is kept may not change before the backward pass
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None, values, kept)
        ctx.product, ctx.structure = product, s
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, kept = ctx.saved_tensors
        product, s = ctx.product, ctx.structure
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        dbias = grad.sum(0) if of_bias else None
        if (
            torch.is_grad_enabled()  # a graph of the gradient
            or s is not product.structure  # a mask that is gone
            or torch._C._functorch.is_legacy_batchedtensor(grad)  # several gradients at once
        ):
            return grad @ weight if of_x else None, grad.t() @ x if of_weight else None, dbias, None
        dense = of_weight and product.dense_gradient
        active, into = of_weight and not dense, None
        if active:
            product.partial = True
            into = None if product.active_gradient else product.buffer()
        dx, dvalues = _OPS.linear_backward(grad, kept, values, s.tensors, of_x, active, into, product.backend)
        dweight = grad.t() @ x if dense else None
        if active:
            dweight = product.sparse(dvalues) if into is None else product.written(into)
        return dx if of_x else None, dweight, dbias, None


def product_of(product: SparseProduct | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a layer: sparse where that is possible, else as `torch.nn.functional.linear`."""
    if product is None:
        return linear(x, weight, bias)
    if product.fits(x, weight):
        if torch.compiler.is_compiling():
            return product.compiled(x, bias)
        if product.is_plain(x):
            return product(x, bias)
    product.missed = product.missed or product.gains
    return linear(x, weight, bias)
