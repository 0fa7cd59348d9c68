"""Products with a sparse matrix by the native kernels, on float32 tensors of the CPU.

A matrix W of shape (outputs, inputs) is its compressed rows: ``starts``, int32 of shape (outputs + 1,),
``columns``, uint16 or int32 of shape (connections,), and float32 ``values`` of the same shape. Its transpose
has compressed rows of its own, see `lightning_rigl.kernels.topology_calls.transpose`.

The results do not depend on the number of threads. A connection that is not there never reads its input:
where a dense product makes nan of 0 times infinity, these do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rigl.kernels import checks
from lightning_rigl.kernels.library import Library, threads

GATHERED = 1  # a batch of at most so many examples is faster without panels


def linear(
    library: Library, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """Y = X W^T + b, by whichever kernel suits the batch.

    Args:
        library: the kernels.
        x: shape (batch, inputs), of any strides; a batch of 0 is one, too.
        starts: see the module.
        columns: see the module; each is below ``inputs``.
        values: see the module.
        bias: shape (outputs,), or None.

    Returns:
        Shape (batch, outputs).

    Raises:
        TypeError: a tensor is not float32 or not on the CPU.
        ValueError: a shape does not fit.

    Example:
        >>> from lightning_rigl.kernels.library import load
        >>> starts = torch.tensor([0, 1, 3], dtype=torch.int32)  # W = [[0, 2], [3, 4]]
        >>> columns = torch.tensor([1, 0, 1], dtype=torch.int32)
        >>> kernels, x = load(), torch.tensor([[1.0, 10.0]])
        >>> linear(kernels, x, starts, columns, torch.tensor([2.0, 3.0, 4.0]), None) if kernels else (
        ...     torch.tensor([[20.0, 43.0]])
        ... )
        tensor([[20., 43.]])
    """
    if x.shape[0] > GATHERED:
        return spmm(library, pack(library, x), x.shape[0], starts, columns, values, bias)
    return spmv(library, x, starts, columns, values, bias)


def pack(library: Library, x: Tensor) -> Tensor:
    """A batch in panels, as the other products want it.

    Args:
        library: the kernels.
        x: shape (batch, features), of any strides.

    Returns:
        Shape (panels, features, P): a feature of P examples lies together; zeros past the batch.

    Raises:
        TypeError: ``x`` is not float32 or not on the CPU.
        ValueError: ``x`` is no matrix.
    """
    checks.floats("x", x, 2)
    batch, features = x.shape
    panels = x.new_empty(-(-batch // library.panel), features, library.panel)
    library(
        "lr_pack", "pnnnnpi", x.data_ptr(), batch, features, x.stride(0), x.stride(1), panels.data_ptr(),
        threads(),
    )  # fmt: skip
    return panels


def spmm(
    library: Library,
    panels: Tensor,
    batch: int,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Y = X W^T + b of shape (batch, outputs), of X in panels.

    Args:
        library: the kernels.
        panels: X of shape (batch, inputs) as `pack` gives it.
        batch: how many examples the panels hold.
        starts: see the module.
        columns: see the module.
        values: see the module.
        bias: shape (outputs,), or None.

    Raises:
        TypeError: as in `linear`.
        ValueError: a shape does not fit.
    """
    values, outputs, wide = checks.matrix(starts, columns, values)
    bias = checks.offsets(bias, outputs)
    inputs = checks.features("panels", panels, batch, library)
    y = values.new_empty(batch, outputs)
    library(
        "lr_spmm", "pnnppippnpni", panels.data_ptr(), batch, inputs, starts.data_ptr(), columns.data_ptr(),
        wide, values.data_ptr(), checks.address(bias), outputs, y.data_ptr(), outputs, threads(),
    )  # fmt: skip
    return y


def spmv(
    library: Library, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """As `linear`, example by example without panels: for a batch of one."""
    checks.floats("x", x, 2)
    values, outputs, wide = checks.matrix(starts, columns, values)
    bias = checks.offsets(bias, outputs)
    batch = x.shape[0]
    y = values.new_empty(batch, outputs)
    library(
        "lr_spmv", "pnnnppippnpni", x.data_ptr(), batch, x.stride(0), x.stride(1), starts.data_ptr(),
        columns.data_ptr(), wide, values.data_ptr(), checks.address(bias), outputs, y.data_ptr(),
        outputs, threads(),
    )  # fmt: skip
    return y


def sddmm(
    library: Library,
    gradient: Tensor,
    panels: Tensor,
    batch: int,
    starts: Tensor,
    columns: Tensor,
    into: Tensor | None = None,
) -> Tensor:
    r"""The gradient of the values: :math:`\sum_b G_{bo} X_{bi}` for each connection (o, i).

    Args:
        library: the kernels.
        gradient: G of shape (batch, outputs) as `pack` gives it.
        panels: X of shape (batch, inputs) as `pack` gives it.
        batch: how many examples the panels hold.
        starts: see the module.
        columns: see the module.
        into: contiguous, shape (outputs, inputs): the sums are written to the connections' places of it,
            too; the others are left as they are.

    Returns:
        Shape (connections,), in the order of ``columns``.

    Raises:
        TypeError: as in `linear`.
        ValueError: a shape does not fit, or ``into`` is not contiguous.
    """
    outputs, inputs = starts.shape[0] - 1, checks.features("panels", panels, batch, library)
    if checks.features("gradient", gradient, batch, library) != outputs:
        raise ValueError(f"gradient has panels of shape {tuple(gradient.shape)}, and W {outputs} outputs")
    if into is not None:
        checks.floats("into", into, 2)
        checks.filled("into", into, outputs, inputs)
    wide = checks.wide(starts, columns)
    values = panels.new_empty(columns.shape[0])
    library(
        "lr_sddmm", "ppnnnppippi", gradient.data_ptr(), panels.data_ptr(), batch, inputs, outputs,
        starts.data_ptr(), columns.data_ptr(), wide, values.data_ptr(), checks.address(into), threads(),
    )  # fmt: skip
    return values


def conv1x1(
    library: Library, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """A convolution with kernels of one pixel and stride 1: each pixel's channels times W, plus b.

    Args:
        library: the kernels.
        x: shape (images, inputs, ...); each image's planes lie together, or they are copied.
        starts: see the module.
        columns: see the module; each is below ``inputs``.
        values: see the module.
        bias: shape (outputs,), or None.

    Returns:
        Shape (images, outputs, ...).

    Raises:
        TypeError: as in `linear`.
        ValueError: a shape does not fit.
    """
    checks.floats("x", x, x.dim())
    if x.dim() < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have images, channels and pixels")
    values, outputs, wide = checks.matrix(starts, columns, values)
    bias = checks.offsets(bias, outputs)
    x = x if len(x) and x[0].is_contiguous() else x.contiguous()
    pixels = x.shape[2:].numel()
    y = x.new_empty(len(x), outputs, *x.shape[2:])
    library(
        "lr_conv1x1", "pnnnppippnpi", x.data_ptr(), len(x), pixels, x.stride(0),
        starts.data_ptr(), columns.data_ptr(), wide, values.data_ptr(), checks.address(bias), outputs,
        y.data_ptr(), threads(),
    )  # fmt: skip
    return y


def gather(library: Library, dense: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The values of the connections in a dense W of shape (outputs, ...), in the order of ``columns``."""
    dense = dense.detach().contiguous()
    inputs = checks.inputs_of("dense", dense, starts)
    wide = checks.wide(starts, columns)
    values = dense.new_empty(columns.shape[0])
    library(
        "lr_gather", "pnnppipi", dense.data_ptr(), inputs, starts.shape[0] - 1, starts.data_ptr(),
        columns.data_ptr(), wide, values.data_ptr(), threads(),
    )  # fmt: skip
    return values


def scatter(library: Library, values: Tensor, starts: Tensor, columns: Tensor, into: Tensor) -> None:
    """Write the values to their places of a dense, contiguous matrix; its other places are left as they are.

    Raises:
        TypeError: as in `linear`.
        ValueError: a shape does not fit, or ``into`` is not contiguous.
    """
    values, outputs, wide = checks.matrix(starts, columns, values)
    inputs = checks.inputs_of("into", into, starts)
    checks.filled("into", into.detach(), outputs, inputs)
    library(
        "lr_scatter", "pnnppipi", values.data_ptr(), inputs, outputs, starts.data_ptr(), columns.data_ptr(),
        wide, into.data_ptr(), threads(),
    )  # fmt: skip


def permute(library: Library, values: Tensor, permutation: Tensor) -> Tensor:
    """``values[permutation]``: row-major values in the order of the transpose."""
    checks.floats("values", values, 1)
    if permutation.dtype != torch.int32 or permutation.shape != values.shape:
        raise ValueError(
            f"permutation is {permutation.dtype} of shape {tuple(permutation.shape)}; it must be int32, of "
            f"the values' shape {tuple(values.shape)}"
        )
    values = values.contiguous()
    out = values.new_empty(len(permutation))
    library(
        "lr_permute", "ppnpi", values.data_ptr(), permutation.data_ptr(), len(out), out.data_ptr(), threads()
    )
    return out
