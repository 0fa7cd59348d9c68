"""Measure what one forward pass costs: which parameter takes part in which product."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rigl.flops.formulas import CostTable, LayerCost

M = TypeVar("M", bound=nn.Module)
Args = Sequence[Any]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base class has no annotations
    """Counts the products of the forward passes that run inside it, each under the parameter it consumes.

    A product is a matrix product, a convolution of any kind or fused attention. Its parameter is found by
    memory, so views, transposes and casts (autocast), functional use, tied and shared weights are followed; a
    product that consumes none is booked under ``other``. Another operator that reads a parameter of two or
    more dimensions is listed in ``unknown``, unless it is a lookup, a norm or element-wise work on the
    activations (a positional embedding, a scale per channel), which FLOP counts leave out.

    The backward pass and recomputation inside it are not counted. With gradients disabled, only what reads
    a trainable parameter or an activation that requires a gradient is: a custom autograd function and a
    reentrant checkpoint run their forward like that, and so does a teacher, whose weights are usually frozen.

    Args:
        parameters: name -> parameter. A product with two parameters counts for the second operand.

    Example:
        >>> net = nn.Sequential(nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 4))
        >>> with Tracer(dict(net.named_parameters())) as tracer:
        ...     _ = net(torch.zeros(32, 100))
        >>> [(layer.name, layer.forward) for layer in tracer.table(samples=32).layers]
        [('0.weight', 2000), ('2.weight', 80)]

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.
    """

    supports_higher_order_operators = True  # without it such an operator would raise inside the mode

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        # Weak references: they keep no memory alive, and yet a key is not reused for another storage.
        self._owners = {key: name for name, p in parameters.items() for key in _storage(p)}
        self._live: set[StorageWeakRef] = set()
        self._macs: dict[str | None, int] = {}
        self._outputs: dict[str | None, int] = {}
        self._unknown: dict[str, None] = {}
        self._restore = ExitStack()

    def table(self, samples: int) -> CostTable:
        """The cost per sample of what ran inside; a cost that ``samples`` does not divide is rounded.

        Args:
            samples: the number of samples that went through, at least 1.

        Raises:
            ValueError: ``samples`` is less than 1.
        """
        if samples < 1:
            raise ValueError(f"samples: at least 1 must have gone through the model, got {samples}")
        layers = tuple(
            LayerCost(
                name, shape, _share(2 * self._macs[name], samples), _share(self._outputs[name], samples)
            )
            for name, shape in self._shapes.items()
            if name in self._macs
        )
        return CostTable(layers, _share(2 * self._macs.get(None, 0), samples), tuple(self._unknown))

    def __enter__(self) -> Tracer:
        # Compiled code and the fused encoder would hide their products; both are put back on exit.
        if hasattr(torch.compiler, "set_stance"):
            self._restore.enter_context(torch.compiler.set_stance("force_eager"))
        self._restore.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        self._restore.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch._C._current_autograd_node() is None:  # None outside of a backward pass
            name = str(getattr(func, "overloadpacket", func))  # a higher-order operator has no overloads
            try:
                self._book(name, func, [*args, *kwargs.values()], out)
            except Exception as error:  # a tensor of an exotic kind must not break the step that is measured
                self._unknown[f"{name} ({type(error).__name__})"] = None
        return out

    def _book(self, name: str, func: Any, args: Args, out: Any) -> None:
        inputs, outputs = list(_tensors(args)), list(_tensors([out]))
        if isinstance(func, HigherOrderOperator):
            self._unknown[name] = None  # what it does inside stays hidden
        elif name in _COPIES and (owner := self._owner(inputs[0])) is not None:
            self._owners.update((key, owner) for o in outputs for key in _storage(o))
        elif not self._has_gradient(inputs, outputs):
            return
        elif name in _PRODUCTS:
            operands, macs = _PRODUCTS[name](args, outputs[0])
            owner = next((n for o in reversed(operands) if (n := self._owner(o)) is not None), None)
            self._macs[owner] = self._macs.get(owner, 0) + int(macs)
            self._outputs[owner] = self._outputs.get(owner, 0) + outputs[0].numel()
        elif torch.is_grad_enabled() and name not in _UNCOUNTED:
            pointwise = torch.Tag.pointwise in func.tags
            self._unknown |= {f"{name} ({w})": None for w in self._read(name, pointwise, inputs, outputs)}

    def _owner(self, tensor: Tensor) -> str | None:
        return next((self._owners[key] for key in _storage(tensor) if key in self._owners), None)

    def _has_gradient(self, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if torch.is_grad_enabled():
            return True
        live = any(t.requires_grad or not self._live.isdisjoint(_storage(t)) for t in inputs)
        if live:
            self._live.update(key for o in outputs for key in _storage(o))
        return live

    def _read(self, name: str, pointwise: bool, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[str]:
        """The weights whose values this operator computes with."""
        if not outputs or any(self._owner(o) is not None for o in outputs):
            return  # a question about a tensor; a view of a parameter, or a write into one
        owned = [(t, owner) for t in inputs if (owner := self._owner(t)) is not None]
        if name in ("aten.cat", "aten.stack") and len(owned) < len(inputs):
            return  # a class token joins the activations
        for tensor, owner in owned:
            broadcast = pointwise and outputs[0].numel() > tensor.numel()
            if len(self._shapes[owner]) > 1 and not broadcast:
                yield owner


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


def _matmul(args: Args, out: Tensor) -> tuple[list[Tensor], int]:
    a, b = args[:2]
    return [a, b], out.numel() * a.shape[-1]


def _addmm(args: Args, out: Tensor) -> tuple[list[Tensor], int]:
    return _matmul(args[1:], out)


def _convolution(args: Args, out: Tensor) -> tuple[list[Tensor], int]:
    # Each output element, or each input element of a transposed convolution, meets one filter.
    x, weight, transposed = args[0], args[1], args[6]
    points = x if transposed else out
    return [x, weight], points.numel() * math.prod(weight.shape[1:])


def _attention(args: Args, out: Tensor) -> tuple[list[Tensor], int]:
    # (..., queries, width) x (..., keys, width), then the scores x (..., keys, width of the values).
    query, key, value = args[:3]
    rows = query.numel() // max(query.shape[-1], 1)
    return [], rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# By name: not every version of torch has every operator.
_PRODUCTS: dict[str, Callable[[Args, Tensor], tuple[list[Tensor], int]]] = {
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot"), _matmul),
    **dict.fromkeys(("aten.matmul", "aten.linear", "aten._scaled_mm"), _matmul),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _addmm),
    **dict.fromkeys(("aten.convolution", "aten._convolution", "aten.convolution_overrideable"), _convolution),
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
}
_COPIES = {"aten._to_copy", "aten.clone", "aten.repeat", "aten.lift_fresh"}
_UNCOUNTED = {
    *("aten.embedding", "aten.embedding_bag", "aten._embedding_bag"),
    *("aten.index", "aten.index_select", "aten.gather"),
    *("aten.native_layer_norm", "aten._fused_rms_norm"),
    *(f"aten.{fill}_like" for fill in ("empty", "zeros", "ones", "full", "rand", "randn", "bernoulli")),
    *(f"aten.new_{fill}" for fill in ("empty", "zeros", "ones", "full", "empty_strided")),
}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> tuple[StorageWeakRef, ...]:
    """The memory of a tensor as a dictionary key; nothing for layouts that have no single storage."""
    if tensor.layout != torch.strided:
        return ()
    return (StorageWeakRef(tensor.untyped_storage()),)  # type: ignore[no-untyped-call]


def _share(total: int, samples: int) -> int:
    return (total + samples // 2) // samples
