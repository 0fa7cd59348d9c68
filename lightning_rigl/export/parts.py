"""Two small layers that a compacted model may hold besides those of the original."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Select(nn.Module):
    """Takes some coordinates along one axis: the features that the next layer reads.

    Args:
        kept: int64, the coordinates, in order.
        axis: the axis, counted from the end (negative).

    Example:
        >>> Select(torch.tensor([0, 2]), -1)(torch.tensor([[5.0, 6.0, 7.0]]))
        tensor([[5., 7.]])
    """

    kept: Tensor

    def __init__(self, kept: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with fewer coordinates."""
        return x.index_select(self.axis, self.kept)

    def extra_repr(self) -> str:
        """How many coordinates, and the axis."""
        return f"{len(self.kept)}, axis={self.axis}"


class ConstantChannels(nn.Module):
    """What removed input channels of constant value add to a convolution that pads with zeros.

    Inside the image that is one number per output channel, at the border less of the kernel is covered: one
    channel of ones goes through the kernel, once for all samples.

    Args:
        kernel: a convolution of one input channel without bias.
    """

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The convolution's output ``y``, with the share of the channels that ``x`` no longer has."""
        ones = torch.ones_like(x[:1, :1])
        added: Tensor = self.kernel(ones)
        return y + added
