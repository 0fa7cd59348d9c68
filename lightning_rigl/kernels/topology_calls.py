"""Selection, index structures and bit masks by the native kernels, on tensors of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_rigl.kernels.library import Library, threads

_NARROW = 1 << 16  # fewer columns than this are told apart by 16 bits
_RANKED = (torch.float32, torch.bfloat16, torch.float16)


def suits(scores: Tensor) -> bool:
    """Whether `top` takes these scores: on the CPU, of a type that float32 holds."""
    return scores.device.type == "cpu" and scores.dtype in _RANKED


def top(library: Library, scores: Tensor, count: int, among: Tensor) -> Tensor:
    """The ``count`` highest scores among the candidates, as `lightning_rigl.topology.selection.top` has it.

    Of equal scores the lower flat index wins; a nan ranks above infinity and ties with every other nan;
    ``-0.0`` equals ``0.0``; the result does not depend on the number of threads.

    Args:
        library: the kernels.
        scores: any shape and layout; float32 or a half type, on the CPU.
        count: how many to choose, from 0 to the number of candidates.
        among: bool, the shape of ``scores``; True where a score is a candidate.

    Returns:
        A contiguous bool mask of the shape of ``scores`` with exactly ``count`` True, all of them candidates.

    Raises:
        TypeError: a tensor of another type or device, where `suits` is False.
        ValueError: the shapes differ, or the count is not within the candidates.
        MemoryError: there is none for the working space (at most 3 bytes a score).
    """
    flat, among = _ranked("scores", scores), _mask("among", among, scores)
    chosen = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    available = library(
        "lr_top", "n:ppnnpi", flat.data_ptr(), among.data_ptr(), flat.numel(), count, chosen.data_ptr(),
        threads(),
    )  # fmt: skip
    _within(count, available)
    return chosen


def csr(library: Library, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compressed rows of a mask.

    Args:
        library: the kernels.
        mask: bool on the CPU; its first dimension is the outputs, all others together the inputs.

    Returns:
        ``starts``, int32 of shape (outputs + 1,), and ``columns`` in row-major order, uint16 where fewer
        than 65,536 inputs allow it, else int32.

    Raises:
        TypeError: ``mask`` is not bool, or not on the CPU.
        ValueError: it has no dimension, or more connections than int32 counts.
    """
    mask = _mask("mask", mask, mask)
    if mask.ndim == 0:
        raise ValueError("mask has no dimension; its first one is that of the outputs")
    rows = len(mask)
    inputs = mask[0].numel() if rows else 0
    starts = torch.empty(rows + 1, dtype=torch.int32, device="cpu")
    number = library("lr_starts", "n:pnnpi", mask.data_ptr(), rows, inputs, starts.data_ptr(), threads())
    if number < 0:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} has more than {2**31 - 1} connections")
    columns = torch.empty(number, dtype=_index_type(inputs), device="cpu")
    library(
        "lr_columns", "pnnppii", mask.data_ptr(), rows, inputs, starts.data_ptr(), columns.data_ptr(),
        wide((starts, columns)), threads(),
    )  # fmt: skip
    return starts, columns


def transpose(
    library: Library, starts: Tensor, columns: Tensor, inputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The structure of the transposed mask, and how values get there.

    Args:
        library: the kernels.
        starts: as `csr` gives it.
        columns: as `csr` gives it.
        inputs: how many columns the matrix has.

    Returns:
        ``starts_t`` and ``columns_t`` as of the transposed mask, and ``permutation``, int32: the k-th
        connection of the transpose is the ``permutation[k]``-th in row-major order.

    Raises:
        TypeError: ``starts`` or ``columns`` are of another type than `csr` makes.
        MemoryError: there is none for the working space (4 bytes an input and thread).
    """
    is_wide, rows = wide((starts, columns)), len(starts) - 1
    starts_t = torch.empty(inputs + 1, dtype=torch.int32, device="cpu")
    columns_t = torch.empty(len(columns), dtype=_index_type(rows), device="cpu")
    permutation = torch.empty(len(columns), dtype=torch.int32, device="cpu")
    failed = library(
        "lr_transpose", "i:ppinnppipi", starts.data_ptr(), columns.data_ptr(), is_wide, rows, inputs,
        starts_t.data_ptr(), columns_t.data_ptr(), wide((starts_t, columns_t)), permutation.data_ptr(),
        threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to transpose {len(columns)} connections of {inputs} inputs")
    return starts_t, columns_t, permutation


def carry(
    library: Library,
    values: Tensor,
    inputs: int,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
) -> Tensor:
    """Numbers of an old structure's connections in the order of a new one, 0 for the connections that came.

    Args:
        library: the kernels.
        values: float32 of shape (connections,) in the order of ``old``, such as an optimizer's state.
        inputs: how many columns both structures have.
        old: ``starts`` and ``columns`` as `csr` gave them before.
        new: as they are now, for a mask of the same shape.

    Raises:
        TypeError: ``values`` is not float32 on the CPU, or a structure is not as `csr` makes it.
        ValueError: the structures are not of the same shape, or ``values`` does not belong to ``old``.
        MemoryError: there is none for the working space (4 bytes an input and thread).
    """
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"values are {values.dtype} on {values.device}; only float32 on the CPU is carried")
    if len(old[0]) != len(new[0]) or old[1].dtype != new[1].dtype or values.shape != old[1].shape:
        raise ValueError(
            f"values of shape {tuple(values.shape)} and a structure with {len(old[0]) - 1} rows and "
            f"{len(old[1])} connections cannot be carried to one with {len(new[0]) - 1} rows; all must be of "
            "the same layer"
        )
    is_wide = wide(old)
    carried = torch.empty(len(new[1]), dtype=torch.float32, device="cpu")
    values = values.contiguous()
    failed = library(
        "lr_carry", "i:pppppinnpi", old[0].data_ptr(), old[1].data_ptr(), values.data_ptr(),
        new[0].data_ptr(), new[1].data_ptr(), is_wide, len(new[0]) - 1, inputs, carried.data_ptr(),
        threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to carry {len(values)} numbers over {inputs} inputs")
    return carried


def pack_bits(library: Library, mask: Tensor) -> Tensor:
    """A bool mask of the CPU as `lightning_rigl.topology.bits.pack` has it, eight connections a byte."""
    mask = _mask("mask", mask, mask)
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8, device="cpu")
    library("lr_pack_bits", "pnpi", mask.data_ptr(), mask.numel(), bits.data_ptr(), threads())
    return bits


def and_bits(library: Library, values: Tensor, bits: Tensor) -> None:
    """Set ``values`` to +0.0 where the bit is 0, in place, in one pass; a nan does not survive it.

    Args:
        library: the kernels.
        values: float32 on the CPU, contiguous.
        bits: as `pack_bits` gives them for a mask of the shape of ``values``.

    Raises:
        TypeError: ``values`` is not float32 or not on the CPU.
        ValueError: ``values`` is not contiguous, or ``bits`` are of another size.
    """
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"values are {values.dtype} on {values.device}; bits mask float32 on the CPU")
    if not values.is_contiguous() or bits.dtype != torch.uint8 or len(bits) != -(-values.numel() // 8):
        raise ValueError(
            f"{bits.numel()} bytes of {bits.dtype} do not mask values of shape {tuple(values.shape)} and "
            f"strides {values.stride()}; values must be contiguous, with a bit each"
        )
    library("lr_and_bits", "ppni", values.data_ptr(), bits.data_ptr(), values.numel(), threads())
    increment_version(values)  # so that autograd knows of the change


def wide(structure: tuple[Tensor, Tensor]) -> int:
    """1 where the columns of ``starts`` and ``columns`` are int32, 0 where uint16.

    Raises:
        TypeError: they are something else, or ``starts`` are not int32, or not on the CPU.
    """
    starts, columns = structure
    on_cpu = starts.device.type == columns.device.type == "cpu"
    if not on_cpu or starts.dtype != torch.int32 or columns.dtype not in (torch.uint16, torch.int32):
        raise TypeError(
            f"starts are {starts.dtype} on {starts.device} and columns {columns.dtype} on {columns.device}; "
            "the kernels read starts in int32 and columns in uint16 or int32, on the CPU"
        )
    return int(columns.dtype == torch.int32)


def _ranked(name: str, scores: Tensor) -> Tensor:
    if not suits(scores):
        raise TypeError(
            f"{name} is {scores.dtype} on {scores.device}; the kernels rank float32 and half types on the "
            "CPU, lightning_rigl.topology.selection ranks all"
        )
    return scores.detach().float().contiguous()


def _mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.device.type != "cpu":
        raise TypeError(f"{name} is {mask.dtype} on {mask.device}; it must be bool on the CPU")
    if mask.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, and what it is for {tuple(like.shape)}")
    return mask.contiguous()


def _within(count: int, available: int) -> None:
    if available == -1:
        raise MemoryError("no memory to select connections")
    if not 0 <= count <= available:
        raise ValueError(f"asked to select {count} of {available} candidates; the count must lie within them")


def _index_type(columns: int) -> torch.dtype:
    return torch.uint16 if columns < _NARROW else torch.int32
