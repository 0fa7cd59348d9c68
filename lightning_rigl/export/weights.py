"""Layers whose weight joins input units to output units, seen as one matrix per tap of the kernel."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_rigl.export.units import UNKNOWN

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer: TypeAlias = nn.Linear | Conv | Transposed

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)


def groups(layer: Layer) -> int:
    """How many blocks the weight has."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def spatial_dims(layer: Layer) -> int:
    """How many axes lie behind the channels: 0 of a linear layer."""
    return layer.weight.dim() - 2


def matrix(layer: Layer) -> Tensor:
    """The weight as (outputs, inputs per group, taps), a view."""
    weight = layer.weight.detach()
    if isinstance(layer, TRANSPOSED):
        weight = weight.transpose(0, 1)
    return weight.reshape(*weight.shape[:2], -1)


def connected(layer: Layer) -> Tensor:
    """Whether an output reads an input at all: bool, (outputs, inputs per group), on the CPU."""
    return (matrix(layer) != 0).any(2).cpu()


def pads_with_zeros(layer: Layer) -> bool:
    """Whether a channel that is constant is something else at the border of the image."""
    if isinstance(layer, nn.Linear) or (max(layer.kernel_size) == 1 and _padding_is_zero(layer)):
        return False
    return isinstance(layer, TRANSPOSED) or (layer.padding_mode == "zeros" and not _padding_is_zero(layer))


def _padding_is_zero(layer: Conv | Transposed) -> bool:
    if isinstance(layer, TRANSPOSED):
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "valid" or max(layer.kernel_size) == 1
    return max(layer.padding) == 0


def foldable(layer: Layer, values: Tensor) -> Tensor:
    """The inputs whose constant value is the same number for every output position: bool per input."""
    return values == 0 if pads_with_zeros(layer) else ~values.isnan()


def folded(layer: Layer, values: Tensor, inputs: Tensor) -> Tensor:
    """What some constant inputs add to each output: float64, one number per output.

    Args:
        layer: a layer of one group.
        values: float64, the value of each input.
        inputs: bool, the inputs to count; their values are known.
    """
    columns = matrix(layer)[:, inputs.to(layer.weight.device)].double().sum(2).cpu()
    return columns @ values[inputs]


def constant_outputs(layer: Layer, values: Tensor) -> Tensor:
    """The value of each output that does not depend on the input, NaN for the others: float64.

    Args:
        layer: any of `LAYERS`.
        values: float64, what is known of each input (NaN: nothing).
    """
    usable, reads = foldable(layer, values), connected(layer)
    blocks, inputs = groups(layer), reads.shape[1]
    if isinstance(layer, TRANSPOSED) and blocks > 1:
        return torch.full((layer.out_channels,), UNKNOWN, dtype=torch.float64)
    per_output = len(reads) // blocks
    sums = matrix(layer).double().sum(2).cpu()
    result = (
        layer.bias.detach().double().cpu() if layer.bias is not None else torch.zeros(len(reads)).double()
    )
    block = torch.arange(len(reads)) // per_output
    known = usable.reshape(blocks, inputs)[block]
    numbers = torch.where(usable, values, 0.0).reshape(blocks, inputs)[block]
    total = result + torch.where(reads & known, sums * numbers, 0.0).sum(1)
    return torch.where((reads & ~known).any(1), UNKNOWN, total)
