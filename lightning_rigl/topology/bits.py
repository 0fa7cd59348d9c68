"""Masks as bits: eight connections a byte in a checkpoint, and a mask that an AND applies to a float."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rigl.kernels import library, topology_calls

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(mask: Tensor) -> Tensor:
    """A bool mask as uint8 on the CPU, eight connections a byte, the lowest flat index in the lowest bit.

    Example:
        >>> pack(torch.tensor([True, False, False, True])).tolist()
        [9]
    """
    flat = mask.reshape(-1).to("cpu", torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(flat), dtype=torch.uint8)
    for bit in range(8):
        packed |= flat[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The bool mask of this shape that `pack` made ``packed`` from.

    Raises:
        ValueError: the bytes do not fit the shape.

    Example:
        >>> unpack(torch.tensor([9], dtype=torch.uint8), (2, 2)).tolist()
        [[True, False], [False, True]]
    """
    size = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.numel() != -(-size // 8):
        raise ValueError(
            f"{packed.numel()} bytes of {packed.dtype} do not hold a mask of shape {tuple(shape)}"
        )
    flat = torch.stack([(packed.reshape(-1) >> bit) & 1 for bit in range(8)], dim=1).view(-1)
    return flat[:size].bool().view(shape)


def integer_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as integers as wide as ``like``'s elements, all ones where active, in ``like``'s layout."""
    integers = torch.empty_like(
        like, dtype=_INTEGER[like.element_size()], memory_format=torch.preserve_format
    )
    return integers.copy_(mask).neg_()


def and_(values: Tensor, integers: Tensor) -> None:
    """Set ``values`` to +0.0 where inactive, in place: a nan does not survive it, nor does a sign."""
    values.view(integers.dtype).bitwise_and_(integers)


class AppliedMask:
    """A mask in the form that zeroes values fastest: integers; bits where the native kernels are loaded.

    Args:
        mask: bool, any shape.
        like: values of the kind that it will be applied to; their layout decides.
    """

    def __init__(self, mask: Tensor, like: Tensor) -> None:
        plain = like.dtype == torch.float32 and like.device.type == "cpu" and like.is_contiguous()
        self._kernels = library.loaded() if plain else None
        self._width = like.element_size()
        self._form = torch.empty(0)
        if self._kernels is None:
            self._form = integer_mask(mask, like)
        else:
            self.renew(mask)

    def renew(self, mask: Tensor) -> None:
        """Take another mask of that shape."""
        if self._kernels is None:
            self._form.copy_(mask).neg_()
        else:
            self._form = topology_calls.pack_bits(self._kernels, mask)

    def fits(self, like: Tensor) -> bool:
        """Whether values of this type can be zeroed."""
        return self._width == like.element_size()

    def zero(self, values: Tensor) -> None:
        """Set ``values`` to +0.0 where inactive, in place, see `and_`."""
        if self._kernels is None:
            and_(values, self._form)
        elif values.is_contiguous():
            topology_calls.and_bits(self._kernels, values, self._form)
        else:
            topology_calls.and_bits(self._kernels, plain := values.contiguous(), self._form)
            values.copy_(plain)


def digest(mask: Tensor) -> int:
    """62 bits that tell a mask from others of its size, whatever the device.

    Example:
        >>> digest(torch.tensor([True, False])) == digest(torch.tensor([False, True]))
        False
    """
    flat = mask.reshape(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    mixed = words ^ torch.arange(1, len(words) + 1, device=mask.device).mul_(-7046029254386353131)
    for shift, factor in ((31, -4658895280553007687), (29, -7723592293110705685)):  # odd, so one to one
        mixed = (mixed ^ (mixed >> shift)).mul_(factor)
    return int((mixed ^ (mixed >> 32)).sum()) & (1 << 62) - 1
