"""Layers for inference whose zeros take no time and no memory: linear ones, and convolutions of one pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rigl.compute import inference  # noqa: F401  # registers the operators
from lightning_rigl.compute.operators import backend_of

_OPS: Any = torch.ops.lightning_rigl


class SparseProduct(nn.Module):
    """A weight W of shape (outputs, inputs) as the compressed rows of what is not zero.

    Buffers: ``values`` float32 and ``columns`` of shape (connections,), ``columns`` int32 or, for the native
    kernels and fewer than 65,536 inputs, uint16; ``starts`` int32 of shape (outputs + 1,); ``bias`` or None.

    Args:
        weight: W, float32 on the CPU.
        bias: of shape (outputs,), or None.
        backend: ``torch`` or ``native``.

    Raises:
        RuntimeError: there are no native kernels here.
    """

    values: Tensor
    starts: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: str) -> None:
        super().__init__()
        weight = weight.detach().contiguous()
        kernels = backend_of(backend)
        structure = kernels.structure(weight != 0)
        self.outputs, self.inputs = weight.shape
        self.backend = backend
        self.register_buffer("values", kernels.gather(weight, structure))
        self.register_buffer("starts", structure.starts)
        self.register_buffer("columns", structure.columns)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def density(self) -> float:
        """Share of the weight that is not zero."""
        return self.columns.numel() / (self.outputs * self.inputs)

    @property
    def matrix(self) -> Tensor:
        """W written out, a new tensor each time."""
        rows = self.values, self.starts, self.columns, self.inputs
        return _OPS.dense.default(*rows)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, density and backend."""
        bias = self.bias is not None
        return f"{self.inputs}, {self.outputs}, bias={bias}, density={self.density:.4f}, {self.backend}"

    def _product(self, x: Tensor, plain: Any, with_gradient: Any) -> Tensor:
        if x.layout is not torch.strided:
            raise TypeError(f"x is {x.layout}; sparse products take dense inputs: give x.to_dense()")
        operator = with_gradient if torch.is_grad_enabled() and x.requires_grad else plain
        rows = self.values, self.starts, self.columns, self.bias, self.inputs, self.backend
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return operator(x.float(), *rows)  # type: ignore[no-any-return]
        return operator(x, *rows)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """The same bits as int16: pickles know no uint16."""
        state, buffers = dict(vars(self)), dict(self._buffers)
        if self.columns.dtype == torch.uint16:
            buffers["columns"] = self.columns.view(torch.int16)
        return {**state, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From what `__getstate__` gave."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.columns.dtype == torch.int16:
            self.columns = self.columns.view(torch.uint16)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *messages: list[str]
    ) -> None:
        """All or nothing, and no indices that would let a kernel read beyond its input."""
        given = {name: state_dict.get(prefix + name) for name in ("values", "starts", "columns")}
        why = self._refusal(**given) if any(t is not None for t in given.values()) else ""
        if why:
            messages[-1].append(f"{prefix.rstrip('.') or 'the model'}: {why}")
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *messages)

    def _refusal(self, values: Tensor | None, starts: Tensor | None, columns: Tensor | None) -> str:
        """Why these are no rows of this layer; empty if they are."""
        if values is None or starts is None or columns is None:
            return "values, starts and columns belong together, and some are missing"
        if starts.shape != self.starts.shape or not values.shape == columns.shape == self.columns.shape:
            return (
                f"{len(columns)} connections of {len(starts) - 1} outputs, and the layer has "
                f"{len(self.columns)} of {self.outputs}: load into an export of the model that it comes from"
            )
        wide = columns.to(torch.int64)
        inside = not len(wide) or (int(wide.min()) >= 0 and int(wide.max()) < self.inputs)
        ordered = bool((starts.diff() >= 0).all()) and starts[[0, -1]].tolist() == [0, len(wide)]
        return "" if inside and ordered else f"no compressed rows of {self.inputs} inputs"


class SparseLinear(SparseProduct):
    """`torch.nn.Linear` whose zeros are skipped.

    The input is float32 on the CPU, of shape (..., inputs). Outputs are those of the dense layer up to
    rounding, also where an input is not finite; under autocast they are float32, where the dense layer gives
    bfloat16. After ``double()`` or ``half()`` the layer refuses to run. The input gets a gradient, by a dense
    product; the weight gets none.

    Args:
        weight: shape (outputs, inputs), float32 on the CPU.
        bias: shape (outputs,), or None.
        backend: ``torch`` or ``native``.

    Example:
        >>> layer = SparseLinear(torch.tensor([[0.0, 2.0], [3.0, 4.0]]), None, "torch")
        >>> layer
        SparseLinear(2, 2, bias=False, density=0.7500, torch)
        >>> layer(torch.tensor([[1.0, 10.0]]))
        tensor([[20., 43.]])
    """

    @property
    def in_features(self) -> int:
        """As `torch.nn.Linear` has it."""
        return self.inputs

    @property
    def out_features(self) -> int:
        """As `torch.nn.Linear` has it."""
        return self.outputs

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it; a copy, so that writing to it changes nothing."""
        return self.matrix

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Linear
        """(..., inputs) -> (..., outputs)."""
        return self._product(input, _OPS.linear.default, _OPS.linear_with_gradient.default)


class SparseConv1x1(SparseProduct):
    """`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d`` with kernels of one pixel, whose zeros are skipped.

    Args:
        weight: shape (outputs, inputs, 1, ...), float32 on the CPU.
        bias: shape (outputs,), or None.
        backend: ``torch`` or ``native``.

    Example:
        >>> layer = SparseConv1x1(torch.tensor([[0.0, 2.0], [3.0, 4.0]])[:, :, None, None], None, "torch")
        >>> layer(torch.tensor([1.0, 10.0])[None, :, None, None]).flatten()
        tensor([20., 43.])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: str) -> None:
        super().__init__(weight.flatten(1), bias, backend)
        self.spatial = weight.dim() - 2

    @property
    def in_channels(self) -> int:
        """As `torch.nn.Conv2d` has it."""
        return self.inputs

    @property
    def out_channels(self) -> int:
        """As `torch.nn.Conv2d` has it."""
        return self.outputs

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it; a copy, so that writing to it changes nothing."""
        return self.matrix[(..., *[None] * self.spatial)]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Conv2d
        """(images, inputs, ...) -> (images, outputs, ...); one image may come without the first dimension."""
        alone = input.dim() == self.spatial + 1
        x = input.unsqueeze(0) if alone else input
        if x.dim() != self.spatial + 2:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; it must have {self.spatial} spatial dimensions "
                "after images (or none) and channels"
            )
        y = self._product(x, _OPS.conv1x1.default, _OPS.conv1x1_with_gradient.default)
        return y.squeeze(0) if alone else y
