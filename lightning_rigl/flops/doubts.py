"""Operators that compute with the values of a weight without being a product that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_rigl.flops.memory import ParameterMemory, storage_of
from lightning_rigl.flops.products import COPIES, JOINS, SUMMED, UNCOUNTED, Product


class Doubts:
    """Collects what must be said of such operators.

    Args:
        memory: knows the parameters.
        shapes: name -> shape of each of them.

    Attributes:
        reports: what to say, in order, as ``"aten.mul (layer.weight)"``.
    """

    def __init__(self, memory: ParameterMemory, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.reports: dict[str, None] = {}
        self._memory = memory
        self._shapes = shapes
        self._hidden: dict[StorageWeakRef, list[str]] = {}  # results that may be a weight
        self._spread: dict[StorageWeakRef, list[str]] = {}  # multiplications of a weight with a batch

    def add(self, report: str) -> None:
        """Say this."""
        self.reports[report] = None

    def note(self, name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Look at an operator that is no product.

        After element-wise work or a lookup the result may be a weight (``w * mask``) or an activation
        (``x + position``): it is reported once a product with no other weight follows. A weight that is
        multiplied with more elements than its own, and then summed over, is reported as well.
        """
        if not outputs or any(self._memory.find(o) for o in outputs):
            return  # a question about a tensor; a view of a parameter, or a write into one
        pointwise = torch.Tag.pointwise in func.tags
        # of parameters alone, but none of them in another form: a Kronecker product, a norm
        alone = bool(inputs) and all(self._memory.is_constant(tensor) for tensor in (*inputs, *outputs))
        made = alone and (name in UNCOUNTED or pointwise)
        reports: list[str] = []
        if elementwise := pointwise or made or name in COPIES | JOINS:
            reports += (report for tensor in inputs for report in _of(tensor, self._hidden))
        if name in SUMMED and outputs[0].dim():
            reports += (report for tensor in inputs for report in _of(tensor, self._spread))
        for tensor in inputs:
            known = [f"{name} ({weight})" for weight in self._weights(tensor)]
            wide = known if _size(outputs[0]) > _size(tensor) and _wide(tensor) > 1 else []
            if name == "aten.mul" and (wide := wide or _of(tensor, self._spread)):
                self._spread |= dict.fromkeys(storage_of(outputs[0]), wide)
            activation = pointwise and outputs[0].numel() > tensor.numel()  # such as with a position added
            if made or (not activation and name not in UNCOUNTED):
                reports += known
        if elementwise:
            self._hidden |= {key: reports for o in outputs for key in storage_of(o) if reports}
        else:
            self.reports |= dict.fromkeys(reports)

    def multiply(self, product: Product) -> None:
        """A product with no weight that is known: one may be hidden in it."""
        for operand in product.operands:
            self.reports |= {report: None for tensor in operand for report in _of(tensor, self._hidden)}
        if product.outputs and len(product.operands[1]) == 1 and product.operands[1][0].dim() > 3:
            self.reports |= dict.fromkeys(_of(product.operands[1][0], self._spread))  # filters by the sample

    def _weights(self, tensor: Tensor) -> dict[str, None]:
        """The parameters of two or more dimensions that it holds; biases and norms are left out of counts."""
        piece = self._memory.find(tensor)
        names = dict.fromkeys(part.name for part in piece.slices) if piece else {}
        return {name: None for name in names if len(self._shapes[name]) > 1}


def _of(tensor: Tensor, reports: Mapping[StorageWeakRef, list[str]]) -> list[str]:
    return [report for key in storage_of(tensor) for report in reports.get(key, ())]


def _wide(tensor: Tensor) -> int:
    """Dimensions of more than one element."""
    return sum(size > 1 for size in tensor.shape)


def _size(tensor: Tensor) -> tuple[int, int]:
    return tensor.numel(), tensor.dim()
