"""A tensor with many zeros in two pieces: where its numbers are, and the numbers. Exact, bit by bit.

An entry is a dict of plain types and tensors, so that ``torch.load(weights_only=True)`` reads it:

- ``dtype``, ``shape``, and ``order``: the dimensions from the outermost in memory to the innermost, so that a
  channels_last tensor comes back as one;
- ``values``: the numbers that are kept, in memory order; or the whole tensor where packing does not pay;
- ``encoding`` and ``places``: where the values are. ``bits`` holds a bit for each weight, the first weight in
  the lowest bit. ``gaps`` holds for each value how many zeros are before it, in bytes; 255 stands for 255
  zeros and no value. ``whole`` needs no places;
- ``mask``: the mask that was given, as another such encoding, or the word ``places`` where it is the places;
- ``crc32``: in a checkpoint, the `checksum` of all the others.

Zero is +0.0 alone: -0.0 and nan are values. Places of a mask are kept whatever they hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Entry: TypeAlias = dict[str, Any]
Array: TypeAlias = npt.NDArray[Any]

GAPS_UP_TO = 0.05  # of the weights; with more, gaps save a fifth of the places' bytes and cost more time
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ESCAPE = 255
_KEYS = {"dtype", "shape", "order", "encoding", "values"}
_OF_AN_ENTRY = 256  # bytes: what its names cost in a file


class Packer:
    """Packs the tensors of one checkpoint.

    A tensor that occurs twice gives one entry, and a tensor that is zero outside the places of another one
    of its shape (the momentum of a weight) is stored on these places, which are kept once.

    Example:
        >>> weight = torch.zeros(100)
        >>> weight[[3, 50]] = torch.tensor([1.5, -2.0])
        >>> entry = Packer().pack(weight)
        >>> entry["encoding"], entry["places"].tolist(), entry["values"].tolist()
        ('gaps', [3, 46], [1.5, -2.0])
        >>> unpack(entry).equal(weight)
        True
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Tensor, Entry]] = {}
        self._shelf: dict[tuple[Any, ...], list[tuple[Array, int, Entry]]] = {}  # bits, how many, encoded

    def pack(self, tensor: Tensor, mask: Tensor | None = None) -> Entry:
        """The entry of a tensor.

        Args:
            tensor: any dense tensor on any device; the entry's tensors are on the CPU. A tensor that is not
                floating is kept whole.
            mask: bool tensor of its shape, True = active. It can be read back with `unpack_mask`, and the
                active places are kept even where they hold zeros.

        Raises:
            TypeError: the tensor is sparse, quantized, without data, or of a subclass.
            ValueError: the mask is not bool or has another shape.
        """
        check_packable(tensor)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != tensor.shape):
            raise ValueError(
                f"a mask of {tuple(mask.shape)}, {mask.dtype}, for a tensor of {tuple(tensor.shape)}; "
                "a mask is bool and has the shape of its tensor"
            )
        if (key := identity(tensor)) not in self._known:
            self._known[key] = (tensor, self._pack(tensor, mask))  # kept: an address may be used again
        return self._known[key][1]

    def shared(self, tensor: Tensor) -> Tensor:
        """The places of a packed tensor if they are these bytes, to be stored once; else ``tensor``."""
        packed = (code["places"] for shelf in self._shelf.values() for _, _, code in shelf)
        return next((p for p in packed if p.shape == tensor.shape and p.equal(tensor)), tensor)

    def _pack(self, tensor: Tensor, mask: Tensor | None) -> Entry:
        order = memory_order(tensor)
        inner = tensor.detach().resolve_conj().resolve_neg().cpu().permute(order).contiguous()
        entry: Entry = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "order": order,
            "encoding": "whole",
            "values": inner,
        }
        active = None if mask is None else mask.cpu().permute(order).contiguous().view(-1).numpy()
        if tensor.is_floating_point():
            self._keep_places(entry, integers(inner), active)
        if active is not None and "mask" not in entry:
            entry["mask"] = _encoded(_bits(active), np.flatnonzero(active), len(active))
        return entry

    def _keep_places(self, entry: Entry, flat: Array, active: Array | None) -> None:
        """Replace the whole tensor by values and places where that is smaller by more than an entry costs."""
        own, given = flat != 0, False
        bits = _bits(own)
        if active is not None and not (bits & ~(wanted := _bits(active))).any():
            own, bits, given = active, wanted, True  # otherwise there are latent weights, or -0.0
        count, code = int(np.count_nonzero(own)), None
        cost = count * flat.itemsize + (len(bits) if count > GAPS_UP_TO * len(flat) else count)
        shelf = self._shelf.setdefault((*entry["shape"], "in", *entry["order"]), [])
        others = [] if given else [it for it in shelf if it[1] >= count and not (bits & ~it[0]).any()]
        if others and (other := min(others, key=lambda it: it[1]))[1] * flat.itemsize <= cost:
            bits, code, cost = other[0], other[2], other[1] * flat.itemsize
        if cost + _OF_AN_ENTRY > flat.nbytes:
            return
        index = np.flatnonzero(own) if code is None else _of_bits(bits, len(flat))
        if code is None:
            code = _encoded(bits, index, len(flat))
            shelf.append((bits, count, code))
        kept = torch.from_numpy(flat.take(index))
        values = kept.view(entry["values"].dtype) if len(index) else entry["values"].new_empty(0)
        entry.update(code, values=values, **({"mask": "places"} if given else {}))


def unpack(entry: Mapping[str, Any]) -> Tensor:
    """The tensor of an entry, on the device its values are on; a whole one is not copied.

    Raises:
        ValueError: the entry's parts do not fit each other.
    """
    shape, order, values = _parts(entry)
    if entry["encoding"] == "whole":
        flat = values.reshape(-1)
    else:
        index = _decoded(entry, prod(shape))
        if values.dim() != 1 or len(index) != len(values):
            raise ValueError(f"{len(index)} places and {values.numel()} values")
        kept = integers(values.cpu())
        dense = np.zeros(prod(shape), dtype=kept.dtype)  # its pages cost nothing until they are touched
        dense[index] = kept
        flat = torch.from_numpy(dense).view(values.dtype).to(values.device)
    return _in_shape(flat, shape, order)


def is_entry(value: object) -> bool:
    """Whether it is what `Packer.pack` gives."""
    return isinstance(value, dict) and value.keys() - {"mask", "places", "crc32"} == _KEYS


def checksum(entry: Mapping[str, Any], start: int = 0) -> int:
    """The crc32 of all that an entry says and holds, but for ``crc32`` itself."""
    crc = start
    for key in sorted(entry.keys() - {"crc32"}):
        if isinstance(value := entry[key], Mapping):
            crc = checksum(value, crc)
        else:
            data: Any = integers(value.cpu()) if isinstance(value, Tensor) else repr((key, value)).encode()
            crc = zlib.crc32(data, crc)
    return crc


def unpack_mask(entry: Mapping[str, Any]) -> Tensor | None:
    """The bool mask that the tensor was packed with, or None."""
    shape, order, _ = _parts(entry)
    given = entry.get("mask")
    if given is None:
        return None
    flat = np.zeros(prod(shape), dtype=bool)
    flat[_decoded(entry if given == "places" else given, len(flat))] = True
    return _in_shape(torch.from_numpy(flat), shape, order)


def check_packable(tensor: Tensor) -> None:
    """Raise TypeError for a tensor that does not hold one number for each of its places."""
    kind = type(tensor.detach())
    if kind is not Tensor:
        raise TypeError(f"a {kind.__name__} cannot be packed; gather or convert it to a plain tensor first")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        what = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
        raise TypeError(f"a {what} tensor cannot be packed; convert it to a plain dense tensor first")


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same memory read in the same way; an empty one is like itself."""
    if not tensor.numel():
        return ("empty", id(tensor))
    where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*where, tensor.is_conj(), tensor.is_neg())


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost, where the tensor lies without holes.

    Example:
        >>> memory_order(torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
        [0, 2, 3, 1]
    """
    plain = list(range(tensor.dim()))
    order = sorted(plain, key=tensor.stride, reverse=True)
    return plain if tensor.is_contiguous() or not tensor.permute(order).is_contiguous() else order


def integers(tensor: Tensor) -> Array:
    """The bits of a contiguous tensor as a flat numpy array of integers, in the same memory."""
    return tensor.view(-1).view(_INTEGER[tensor.element_size()]).numpy()


def _bits(own: Array) -> Array:
    return np.packbits(own, bitorder="little")


def _of_bits(bits: Array, size: int) -> Array:
    return np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little").view(bool))


def _encoded(bits: Array, index: Array, size: int) -> Entry:
    """These places among ``size`` weights, as gaps where they are few, else as bits."""
    if len(index) > GAPS_UP_TO * size:
        return {"encoding": "bits", "places": torch.from_numpy(bits)}
    gaps = np.diff(index, prepend=-1) - 1
    if not len(gaps) or gaps.max() < _ESCAPE:
        return {"encoding": "gaps", "places": torch.from_numpy(gaps.astype(np.uint8))}
    ends = np.cumsum(gaps // _ESCAPE + 1) - 1
    code = np.full(ends[-1] + 1, _ESCAPE, dtype=np.uint8)
    code[ends] = gaps % _ESCAPE
    return {"encoding": "gaps", "places": torch.from_numpy(code)}


def _decoded(entry: Mapping[str, Any], size: int) -> Array:
    """The flat indices of the places among ``size`` weights."""
    code = integers(entry["places"].cpu())
    if code.dtype != np.uint8:
        raise ValueError(f"places are {code.dtype} and not bytes")
    if entry["encoding"] == "bits":
        if len(code) != -(-size // 8):
            raise ValueError(f"{len(code)} bytes of bits for {size} weights")
        return _of_bits(code, size)
    if entry["encoding"] != "gaps":
        raise ValueError(f"encoding {entry['encoding']!r} is not known")
    steps = code.astype(np.int64)
    steps += code != _ESCAPE
    index: Array = (np.cumsum(steps) - 1)[code != _ESCAPE]
    if len(index) and index[-1] >= size:
        raise ValueError(f"gaps reach to place {index[-1]} of {size} weights")
    return index


def _parts(entry: Mapping[str, Any]) -> tuple[list[int], list[int], Tensor]:
    """Shape, order and values of an entry, when they can be those of a tensor."""
    shape, order, values = entry["shape"], entry["order"], entry["values"]
    if sorted(order) != list(range(len(shape))) or values.dtype != getattr(torch, entry["dtype"]):
        raise ValueError(f"a tensor of {shape}, {entry['dtype']}, in order {order} holds {values.dtype}")
    return shape, order, values


def _in_shape(flat: Tensor, shape: list[int], order: list[int]) -> Tensor:
    inner = flat.view([shape[d] for d in order])
    return inner.permute([order.index(d) for d in range(len(order))])
