"""What the products ask of their tensors, refused in words where it is not so."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rigl.kernels.library import Library


def floats(name: str, x: Tensor, dimensions: int) -> None:
    """A float32 tensor of the CPU with so many dimensions.

    Raises:
        TypeError: another type or device.
        ValueError: other dimensions.
    """
    if x.dtype != torch.float32 or not x.is_cpu:
        raise TypeError(f"{name} is {x.dtype} on {x.device}; the kernels multiply float32 on the CPU")
    if x.dim() != dimensions:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {dimensions} dimension(s)")


def matrix(starts: Tensor, columns: Tensor, values: Tensor) -> tuple[Tensor, int, int]:
    """Of a matrix in compressed rows: its values, contiguous, its number of outputs, and `wide`."""
    floats("values", values, 1)
    if values.shape != columns.shape:
        raise ValueError(f"there are {values.shape[0]} values for {columns.shape[0]} connections")
    return values.contiguous(), starts.shape[0] - 1, wide(starts, columns)


def offsets(bias: Tensor | None, outputs: int) -> Tensor | None:
    """The bias, contiguous: one number an output."""
    if bias is None:
        return None
    floats("bias", bias, 1)
    if bias.shape[0] != outputs:
        raise ValueError(f"bias has {bias.shape[0]} elements, and W {outputs} outputs")
    return bias.contiguous()


def features(name: str, panels: Tensor, batch: int, library: Library) -> int:
    """The number of features that panels of this batch hold."""
    floats(name, panels, 3)
    wanted = (-(-batch // library.panel), panels.shape[1], library.panel)
    if tuple(panels.shape) != wanted or not panels.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(panels.shape)}; a batch of {batch} makes {wanted}")
    return panels.shape[1]


def inputs_of(name: str, dense: Tensor, starts: Tensor) -> int:
    """The number of inputs of a dense tensor whose first dimension is the outputs."""
    floats(name, dense, dense.dim())
    if dense.dim() == 0 or len(dense) != starts.shape[0] - 1:
        raise ValueError(f"{name} has shape {tuple(dense.shape)}, and W {starts.shape[0] - 1} outputs")
    return dense.shape[1:].numel()


def filled(name: str, dense: Tensor, outputs: int, inputs: int) -> None:
    """A dense matrix of so many rows that lie one after the other."""
    if dense.numel() != outputs * inputs or not dense.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(dense.shape)} and strides {dense.stride()}; it must be contiguous, "
            f"{outputs} rows of {inputs}"
        )


def address(x: Tensor | None) -> int | None:
    """Where its numbers lie; None for nothing."""
    return None if x is None else x.data_ptr()


def wide(starts: Tensor, columns: Tensor) -> int:
    """1 where the columns are int32, 0 where they are uint16.

    Raises:
        TypeError: another type, or indices that do not lie one after the other.
    """
    if columns.dtype not in (torch.uint16, torch.int32) or starts.dtype != torch.int32:
        raise TypeError(
            f"starts are {starts.dtype} and columns {columns.dtype}; starts must be int32, columns uint16 or "
            "int32"
        )
    if not (starts.is_contiguous() and columns.is_contiguous() and starts.is_cpu and columns.is_cpu):
        raise TypeError("starts and columns must be contiguous and on the CPU")
    return int(columns.dtype == torch.int32)
