"""Dense initial weights, rescaled for the connections that a mask leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_rigl.methods.base import Method
from lightning_rigl.model import sharding
from lightning_rigl.model.layers import named_parameters

How = Literal["layer", "neuron"]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rescale(weight: Tensor, mask: Tensor, how: How, transposed: int = 0) -> Tensor:
    """Initial weights whose neurons see the variance that they would see in the dense layer.

    A sum of fewer random terms has a smaller variance. Each weight is multiplied by sqrt(dense / active): for
    ``layer`` the connections of the layer, dense and active, so that the variance of the pre-activations is
    right on average; for ``neuron`` those that enter its output neuron, so that it is right in each. All
    other weights are zero, and so are those of a neuron without connections.

    The outputs are dimension 0 in linear layers, convolutions (grouped ones too), in the projections of
    attention, and in RNNs, where each gate of each unit is one, and input and recurrent weights are two
    layers. In a transposed convolution, whose weight is (inputs, outputs / groups, kernel), they are
    dimension 1 of each group of inputs.

    Where the variance of an initialisation is inversely proportional to a fan (Glorot, He), ``layer`` is the
    same initialisation with the fans that the layer has left on average. It is meant for initial weights,
    drawn for the dense layer: trained ones are what they should be.

    Args:
        weight: initial values of the dense layer, floating; not changed.
        mask: bool, True = active; shape of ``weight``.
        how: ``layer`` or ``neuron``.
        transposed: the groups of a transposed convolution (see `transposed_groups`); 0 for all other layers.

    Returns:
        A new tensor like ``weight``, computed in float64 and rounded once.

    Raises:
        TypeError: ``weight`` is not floating or ``mask`` is not bool.
        ValueError: shapes that differ, another ``how``, a weight without an output dimension, or groups that
            do not divide the inputs.

    Reference:
        Evci et al., *Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win*, AAAI 2022,
        arXiv:2010.03533.

    Example:
        >>> mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
        >>> rescale(torch.ones(2, 4), mask, "neuron")
        tensor([[2.0000, 0.0000, 0.0000, 0.0000],
                [1.1547, 1.1547, 1.1547, 0.0000]])
        >>> rescale(torch.ones(2, 4), mask, "layer")
        tensor([[1.4142, 0.0000, 0.0000, 0.0000],
                [1.4142, 1.4142, 1.4142, 0.0000]])
    """
    _check(weight, mask, how, transposed)
    values, active = weight.detach().cpu().double(), mask.detach().cpu()
    scaled = values * _scales(active, how, transposed)
    return scaled.masked_fill_(~active, 0.0).to(weight.dtype).to(weight.device)


def refuse(method: Method, how: object) -> None:
    """Raise ValueError for another ``how``, or a method whose masks are full at the start."""
    if how not in get_args(How):
        raise ValueError(f"rescale: one of {', '.join(get_args(How))}, or None, got {how!r}")
    if method.starts_dense:
        raise ValueError(
            f"rescale={how!r} is for masks that leave connections out, and {type(method).__name__} starts "
            "with all of them: leave it out"
        )


@torch.no_grad()
def rescale_weights(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    how: How,
    kept: Mapping[str, Tensor],
) -> None:
    """Rescale the initial weights of a model in place.

    Args:
        model: its modules tell which weights are transposed.
        parameters: cleaned name -> parameter.
        masks: of some of them.
        how: as for `rescale`.
        kept: initial values of all connections, active or not, to be scaled in place alike; those of a neuron
            without connections stay.
    """
    groups = transposed_groups(model)
    for name, mask in masks.items():
        weight, whole = sharding.full(parameters[name].detach()), sharding.full(mask)
        scaled = rescale(weight, whole, how, groups.get(name, 0))
        parameters[name].copy_(sharding.shard(scaled, parameters[name]))
        if name in kept:
            scale = _scales(whole.cpu(), how, groups.get(name, 0)).to(kept[name])
            kept[name].mul_(scale.nan_to_num(posinf=1.0))


def transposed_groups(model: nn.Module) -> dict[str, int]:
    """Cleaned parameter name -> groups, for the weights of transposed convolutions.

    Example:
        >>> transposed_groups(nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(4, 6, 3, groups=2)))
        {'1.weight': 2}
    """
    groups = {id(m.weight): m.groups for m in model.modules() if isinstance(m, _TRANSPOSED)}
    return {name: groups[id(p)] for name, p in named_parameters(model).items() if id(p) in groups}


def _scales(active: Tensor, how: How, transposed: int) -> Tensor:
    """The scale of each weight of a layer, of a shape that broadcasts to its mask's."""
    if how == "layer":
        return _scale(active.numel(), active.sum())
    if transposed:
        return _per_transposed_output(active, transposed)
    inputs = active.flatten(1)
    return _scale(inputs.shape[1], inputs.sum(1)).view(-1, *[1] * (active.dim() - 1))


def _scale(dense: int, active: Tensor) -> Tensor:
    """sqrt(dense / active); infinite where nothing is active, and then there is nothing to scale."""
    return (torch.tensor(dense, dtype=torch.float64) / active).sqrt()


def _per_transposed_output(active: Tensor, groups: int) -> Tensor:
    """The scale of each weight of a transposed convolution, (inputs, outputs / groups, 1, ...)."""
    inputs, outputs = active.shape[:2]
    grouped = active.reshape(groups, inputs // groups, outputs, -1)
    scale = _scale(grouped.shape[1] * grouped.shape[3], grouped.sum((1, 3), keepdim=True))
    return scale.expand(-1, inputs // groups, -1, -1).reshape(inputs, outputs, *[1] * (active.dim() - 2))


def _check(weight: Tensor, mask: Tensor, how: str, transposed: int) -> None:
    if not weight.is_floating_point() or mask.dtype != torch.bool:
        raise TypeError(f"rescale: a floating weight and a bool mask, got {weight.dtype} and {mask.dtype}")
    if weight.shape != mask.shape:
        raise ValueError(
            f"rescale: the weight is {tuple(weight.shape)} and its mask {tuple(mask.shape)}; they must agree"
        )
    if how not in get_args(How):
        raise ValueError(f"rescale: how is one of {', '.join(get_args(How))}, got {how!r}")
    if weight.dim() < 2:
        raise ValueError(
            f"rescale: a weight needs a dimension of outputs and one of inputs, got {tuple(weight.shape)}"
        )
    if transposed and (transposed < 0 or weight.shape[0] % transposed):
        raise ValueError(
            f"rescale: transposed={transposed} groups do not divide {weight.shape[0]} inputs; give those "
            "of the transposed convolution, or 0 for another layer"
        )
