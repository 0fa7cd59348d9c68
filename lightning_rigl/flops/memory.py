"""Which memory holds what of the parameters: they are found through views, copies, arithmetic and ties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_rigl.flops.products import COPIES, FILLS, JOINS, PRODUCTS_ADDED, REORDERS, SUMS, Args


class Slice(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter."""

    name: str
    start: int
    stop: int
    filled: bool = False  # with something added to them, so that none is zero


class Piece(NamedTuple):
    """What the elements ``begin`` to ``end`` of a storage hold of the parameters."""

    begin: int
    end: int
    slices: tuple[Slice, ...]
    ordered: bool  # the i-th element here is the i-th of the only slice

    def cut(self, begin: int, end: int) -> Piece:
        """The part within ``begin`` and ``end``; everything where the order of the elements is not known."""
        if not self.ordered:
            return self
        begin, end = max(begin, self.begin), min(end, self.end)
        only = self.slices[0]
        start = only.start + begin - self.begin
        return Piece(begin, end, (only._replace(start=start, stop=start + end - begin),), ordered=True)


class ParameterMemory:
    """Follows the parameters through a computation.

    Args:
        parameters: name -> parameter.
        buffers: tensors that are no activations, such as masks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Iterable[Tensor] = ()) -> None:
        # Weak references: they keep no memory alive, and yet a key is not reused for another storage.
        self._pieces: dict[StorageWeakRef, list[Piece]] = {}
        for name, parameter in parameters.items():
            whole = (Slice(name, 0, parameter.numel()),)
            self._register(parameter, whole, ordered=parameter.is_contiguous())
        self._own = frozenset(self._pieces)  # that of the parameters themselves
        self._constant = {key for buffer in buffers for key in storage_of(buffer)}

    def find(self, tensor: Tensor) -> Piece | None:
        """What the tensor holds of the parameters; None if it is an activation or a constant."""
        keys = storage_of(tensor)
        pieces = [piece for key in keys for piece in self._pieces.get(key, ())]
        if not pieces:
            return None
        begin = int(tensor.storage_offset())
        end = begin + _extent(tensor)
        around = [p for p in pieces if p.begin <= begin and end <= p.end][:1]
        parts = around or [p for p in pieces if p.begin < end and begin < p.end]
        if _distinct(tensor) == end - begin:  # without gaps
            parts = [piece.cut(begin, end) for piece in parts]
        if len(parts) < 2:
            return parts[0] if parts else None
        return Piece(begin, end, tuple(s for piece in parts for s in piece.slices), ordered=False)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the tensor is made of parameters, buffers and numbers only."""
        keys = storage_of(tensor)
        return tensor.dim() == 0 or all(key in self._pieces or key in self._constant for key in keys)

    def follow(self, name: str, func: Any, args: Args, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Take note of what an operator made; whether it is a parameter in another form."""
        drawn = not inputs and torch.Tag.nondeterministic_seeded in func.tags  # noise stands for a batch
        made = {key for o in outputs for key in storage_of(o) if key not in self._pieces}
        written = name == "aten.lift_fresh"  # a tensor made of Python numbers
        if drawn or not (written or all(self.is_constant(tensor) for tensor in inputs)):
            self._constant -= made  # what was allocated before may now hold activations
            return False
        self._constant |= made
        pieces = [(tensor, piece) for tensor in inputs if (piece := self.find(tensor)) is not None]
        if name.endswith("_") and name[:-1] in SUMS | FILLS:
            self._fill(name[:-1], args, inputs[0])
        if not pieces or not made:
            return False  # a question about a tensor; a view of a parameter, or a write into one
        out = outputs[0]
        if name in JOINS:
            self._join(pieces, out, rows=next((dim for dim in args if isinstance(dim, int)), 0) == 0)
            return True
        same = [(tensor, piece) for tensor, piece in pieces if tensor.numel() == out.numel()]
        if name in PRODUCTS_ADDED:
            same = [(t, piece) for t, piece in same if t is args[0] and t.shape == out.shape]  # no bias
        if name in COPIES or ((torch.Tag.pointwise in func.tags or name in PRODUCTS_ADDED) and same):
            source, piece = (same or pieces)[0]
            alike = source.shape == out.shape and source.stride() == out.stride() and name not in REORDERS
            filled = name in FILLS or (name in SUMS and not self._is_same(args[:2], piece))
            slices = tuple(part._replace(filled=part.filled or filled) for part in piece.slices)
            self._register(out, slices, piece.ordered and alike)
            return True
        return False

    def _fill(self, name: str, args: Args, written: Tensor) -> None:
        """What was a copy of a weight has something added to it, in place; a weight itself is trained so."""
        piece = self.find(written)
        if piece is not None and (name in FILLS or not self._is_same(args[:2], piece)):
            for key in storage_of(written):
                if key not in self._own:
                    full = tuple(part._replace(filled=True) for part in piece.slices)
                    self._pieces[key] = [piece._replace(slices=full)]

    def _is_same(self, terms: Args, piece: Piece) -> bool:
        """Whether all terms of a sum hold the same elements of a parameter, so that its zeros stay."""
        found = [self.find(term) if isinstance(term, Tensor) else None for term in terms]
        return all(f is not None and f.slices == piece.slices and f.ordered == piece.ordered for f in found)

    def _join(self, pieces: list[tuple[Tensor, Piece]], out: Tensor, rows: bool) -> None:
        """Register what ``cat`` or ``stack`` made; along the first dimension each part lies by itself."""
        if not rows or not out.is_contiguous() or sum(t.numel() for t, _ in pieces) != out.numel():
            self._register(out, tuple(s for _, piece in pieces for s in piece.slices), ordered=False)
            return
        flat, begin = out.view(-1), 0
        for tensor, piece in pieces:
            part = flat[begin : begin + tensor.numel()]
            self._register(part, piece.slices, piece.ordered and tensor.is_contiguous())
            begin += tensor.numel()

    def _register(self, tensor: Tensor, slices: tuple[Slice, ...], ordered: bool) -> None:
        begin = int(tensor.storage_offset())
        for key in storage_of(tensor):
            self._pieces.setdefault(key, []).append(Piece(begin, begin + _extent(tensor), slices, ordered))


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or the results of an operator."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def storage_of(tensor: Tensor) -> tuple[StorageWeakRef, ...]:
    """The memory of a tensor as a dictionary key; nothing for layouts that have no single storage."""
    if tensor.layout != torch.strided:
        return ()
    return (StorageWeakRef(tensor.untyped_storage()),)  # type: ignore[no-untyped-call]


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last that a tensor reaches in its storage."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _distinct(tensor: Tensor) -> int:
    """Elements of its storage that a tensor shows, each once."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
