"""Masks that serve as controls for others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_rigl.model.sparse_layer import private_generator


def shuffled(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same number of connections in each layer, at other places at random.

    A layer that is neither full nor empty always comes out different: a draw that gives the mask itself is
    repeated. Does a mask's accuracy come from which connections it has, or from how many each layer has?

    Args:
        masks: parameter name -> bool tensor; they are not changed.
        seed: of the places; together with the name of a layer it decides them.

    Returns:
        Parameter name -> new bool tensor of the same shape, device and count.

    Reference:
        Frankle et al., *Pruning Neural Networks at Initialization: Why Are We Missing the Mark?*, ICLR 2021,
        arXiv:2009.08576.

    Example:
        >>> masks = {"fc.weight": torch.tensor([[True, True, False, False], [False, False, False, False]])}
        >>> control = shuffled(masks, seed=0)["fc.weight"]
        >>> int(control.sum()), bool((control == masks["fc.weight"]).all())
        (2, False)
    """
    return {name: _shuffled(name, mask, seed) for name, mask in masks.items()}


def _shuffled(name: str, mask: Tensor, seed: int) -> Tensor:
    if mask.all() or not mask.any():
        return mask.clone()
    generator = private_generator(seed, f"shuffled {name}", 0)
    while True:
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        places = mask.flatten()[order].view(mask.shape)
        if not torch.equal(places, mask):
            return places
