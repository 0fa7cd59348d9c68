"""Measure what one forward pass costs: which parameter takes part in which product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rigl.flops.costs import CostTable, LayerCost
from lightning_rigl.flops.custom_functions import is_trained_inside
from lightning_rigl.flops.doubts import Doubts
from lightning_rigl.flops.memory import ParameterMemory, Slice, storage_of, tensors_of
from lightning_rigl.flops.products import PRODUCTS, SPARSE, Args, Product


@dataclass
class _Sum:
    """Multiply-adds of the products that share their parameters."""

    forward: int = 0
    outputs: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0
    recompute: int = 0
    no_gradient: int = 0

    def add(self, other: _Sum) -> None:
        for field, value in vars(other).items():
            setattr(self, field, getattr(self, field) + value)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base class has no annotations
    """Counts the products of the training steps that run inside it, each under the parameters it consumes.

    A product is a matrix product, a convolution of any kind, fused attention or a fused recurrent layer. Its
    parameter, or the slice of one, is found by memory: through views, transposes, casts (autocast),
    arithmetic with other parameters and buffers (``w * mask``, weight norm), joining, functional use and
    ties. A product of two parameters is scaled by both; one of none is booked apart and never scaled. Another
    operator that reads a parameter of two or more dimensions is listed in ``unknown``, unless it is a norm, a
    reduction, or a lookup or element-wise work that makes activations, which FLOP counts leave out.

    A layer that computes sparsely while it is trained counts as the dense one; one of `export.sparse` has no
    parameter, and counts what it has left.

    Two rules: attention counts the whole square, whatever a causal mask leaves out, and a bilinear layer is
    its first input times the weight, then times the second.

    Which gradients autograd will compute is seen from what requires one, in the forward pass; of the backward
    pass itself only what activation checkpointing repeats is counted (a gradient of a gradient is taken for
    that too). Forward products with gradients disabled, of a teacher or of a generator's samples, are booked
    apart; not so those inside of a custom autograd function, as a reentrant checkpoint is one.

    Args:
        parameters: name -> parameter. A product with two parameters is a row of the second operand's.
        buffers: tensors that are no activations, such as masks.
        inference: a forward pass is one, also with gradients disabled.

    Attributes:
        optimizes: set while an optimizer makes a step: its own products are not counted.
        varies: whether the cost depends on values, such as the lengths of packed sequences.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(100, 10), torch.nn.ReLU(), torch.nn.Linear(10, 4))
        >>> with Tracer(dict(net.named_parameters())) as tracer:
        ...     _ = net(torch.zeros(32, 100))
        >>> [(layer.name, layer.forward, layer.input_gradient) for layer in tracer.table(samples=32).layers]
        [('0.weight', 2000, 0), ('2.weight', 80, 80)]

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.
    """

    supports_higher_order_operators = True  # without it such an operator would raise inside the mode

    def __init__(
        self, parameters: Mapping[str, Tensor], buffers: Iterable[Tensor] = (), inference: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._memory = ParameterMemory(parameters, buffers)
        self._live: set[StorageWeakRef] = set()  # of a custom function: activations that require a gradient
        self._doubts = Doubts(self._memory, self._shapes)
        self._inference = inference
        self.optimizes = self.varies = False
        self._sums: dict[tuple[Slice | None, Slice | None], _Sum] = {}
        self._restore = ExitStack()

    def table(self, samples: int) -> CostTable:
        """The cost per sample of what ran inside, or of all samples together if they do not divide it.

        Args:
            samples: the number of samples that went through, at least 1.

        Raises:
            ValueError: ``samples`` is less than 1.
        """
        if samples < 1:
            raise ValueError(f"samples: at least 1 must have gone through the model, got {samples}")
        places = {name: place for place, name in enumerate(self._shapes)}
        rows = sorted(
            ((own, partner, s) for (own, partner), s in self._sums.items() if own),
            key=lambda row: (places[row[0].name], *row[0][1:], str(row[1])),
        )
        none = self._sums.get((None, None), _Sum())
        table = CostTable(
            tuple(self._layer(own, partner, products) for own, partner, products in rows),
            2 * none.forward,
            tuple(self._doubts.reports),
            2 * none.input_gradient,
            2 * none.recompute,
            2 * none.no_gradient,
            samples,
        )
        return table.per_sample() if table.is_whole else table

    def _layer(self, own: Slice, partner: Slice | None, products: _Sum) -> LayerCost:
        shape = self._shapes[own.name]
        whole = own.stop - own.start == math.prod(shape)
        return LayerCost(
            own.name,
            shape,
            2 * products.forward,
            products.outputs,
            2 * products.input_gradient,
            2 * products.weight_gradient,
            2 * products.recompute,
            2 * products.no_gradient,
            start=own.start,
            stop=None if whole else own.stop,
            partner=self._key(partner) if partner else "",
            partner_numel=partner.stop - partner.start if partner else 1,
            filled=own.filled,
        )

    def _key(self, own: Slice) -> str:
        whole = own.stop - own.start == math.prod(self._shapes[own.name])
        return own.name if whole else f"{own.name}[{own.start}:{own.stop}]"

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
        name = str(getattr(func, "overloadpacket", func))  # a higher-order operator has no overloads
        if torch.is_inference_mode_enabled() and name not in PRODUCTS and isinstance(func, OpOverload):
            out = self._decompose(func, args, kwargs)  # in this mode alone operators come whole
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        backward = torch._C._current_autograd_node() is not None  # None outside of a backward pass
        if not backward or torch.is_grad_enabled() or is_trained_inside():  # inside: what is repeated
            try:
                self._book(name, func, [*args, *kwargs.values()], out, backward)
            except Exception as error:  # a tensor of an exotic kind must not break the step that is measured
                self._doubts.add(f"{name} ({type(error).__name__})")
        return out

    def _decompose(self, func: OpOverload[Any, Any], args: Args, kwargs: dict[str, Any]) -> Any:
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            return func.decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _book(self, name: str, func: Any, args: Args, out: Any, again: bool) -> None:
        args = args[:3] if name in SPARSE else args  # the rest is where the zeros are
        inputs, outputs = list(tensors_of(args)), list(tensors_of([out]))
        if isinstance(func, HigherOrderOperator):
            self._doubts.add(name)  # what it does inside stays hidden
            return
        trains = torch.is_grad_enabled() or bool(is_trained_inside())
        if trains and not torch.is_grad_enabled() and any(self._is_live(t) for t in inputs):
            self._live |= {key for o in outputs for key in storage_of(o)}
        self.varies = self.varies or name == "aten._pack_padded_sequence"
        if self._memory.follow(name, func, args, inputs, outputs) and name not in PRODUCTS:
            return
        counts = trains or self._inference
        if self.optimizes and not counts:
            return
        if name in PRODUCTS:
            for product in PRODUCTS[name](args, outputs[0]):
                self._multiply(product, "recompute" if again else "forward" if counts else "no_gradient")
        elif torch.is_grad_enabled() or self._inference:
            self._doubts.note(name, func, inputs, outputs)

    def _multiply(self, product: Product, column: str) -> None:
        """Book one product under the parameters among its operands."""
        pieces = [self._memory.find(o[0]) if len(o) == 1 else None for o in product.operands]
        own = 1 if pieces[1] else 0
        weight, partner = pieces[own], pieces[0] if own else None
        macs, (first, second) = product.macs, self._gradients(product)
        if weight is None:
            self._add((None, None), column, _Sum(macs, 0, first + second))
            self._doubts.multiply(product)
            return
        gradients = (first, second) if own else (second, first)
        total = sum(s.stop - s.start for s in weight.slices) or 1
        for part in weight.slices:
            share = part.stop - part.start
            values = (macs, product.outputs, *gradients)
            sums = _Sum(*(value * share // total for value in values))
            self._add((part, partner.slices[0] if partner else None), column, sums)

    def _gradients(self, product: Product) -> tuple[int, int]:
        """Multiply-adds of the gradients of the two operands that autograd will compute."""
        first, second = (any(self._is_live(o) for o in operand) for operand in product.operands)
        return product.macs * first, product.macs * second

    def _add(self, key: tuple[Slice | None, Slice | None], column: str, products: _Sum) -> None:
        only = products if column == "forward" else _Sum(**{column: products.forward})
        self._sums.setdefault(key, _Sum()).add(only)

    def _is_live(self, tensor: Tensor) -> bool:
        """Whether autograd will ask for the tensor's gradient."""
        if tensor.requires_grad or torch.is_grad_enabled():
            return tensor.requires_grad
        return not self._live.isdisjoint(storage_of(tensor))
