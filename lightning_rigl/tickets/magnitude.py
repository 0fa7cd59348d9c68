"""Pruning by magnitude over all layers: integers and tensors, no training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from lightning_rigl.topology import selection


def to_prune(share: float, remaining: int) -> int:
    """How many of the remaining connections a round removes: ceil(share * remaining), exact.

    The share is the decimal number that was written: 0.07 of 100 is 7, where doubles would say 8.

    Args:
        share: in (0, 1).
        remaining: active connections.

    Example:
        >>> remaining = 1000
        >>> for _ in range(5):
        ...     remaining -= to_prune(0.2, remaining)
        ...     print(remaining)
        800
        640
        512
        409
        327
    """
    return math.ceil(Fraction(repr(share)) * remaining)


def pruned(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The masks without the ``count`` active connections of smallest magnitude, among all layers together.

    Of equal magnitudes those of the earlier layer stay, and in one layer those of lower flat index.

    Args:
        weights: name -> values; those of names that have no mask are not looked at.
        masks: name -> bool tensor of the weight's shape, True = active, in the order of the layers.
        count: how many to remove, from 0 to all active ones.

    Returns:
        Name -> new bool tensor; every active connection was active before.

    Raises:
        ValueError: a mask without its weight, a weight that is not finite, a layer that would be left without
            connections, a count out of range.

    Reference:
        Frankle & Carbin, *The Lottery Ticket Hypothesis*, ICLR 2019, arXiv:1803.03635.

    Example:
        >>> weights = {"a": torch.tensor([3.0, -1.0, 0.5]), "b": torch.tensor([0.1, -2.0])}
        >>> full = {name: torch.ones_like(weight).bool() for name, weight in weights.items()}
        >>> {name: mask.tolist() for name, mask in pruned(weights, full, 2).items()}
        {'a': [True, True, False], 'b': [False, True]}
    """
    active = []
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"{name} has a mask and no weight among {', '.join(list(weights)[:5])}, ...")
        active.append(weights[name].detach().abs()[mask])
        if not active[-1].isfinite().all():
            raise ValueError(f"{name} has weights that are not finite: the training has diverged")
    scores = torch.cat(active)
    stay = selection.drop(scores, torch.ones_like(scores, dtype=torch.bool), count)
    stays = torch.split(stay, [len(part) for part in active])
    kept = {
        name: mask.masked_scatter(mask, own) for (name, mask), own in zip(masks.items(), stays, strict=True)
    }
    if empty := [name for name, mask in kept.items() if not mask.any()]:
        raise ValueError(
            f"{empty[0]} would have no connection left of {int(masks[empty[0]].sum()):,}: global magnitude "
            "takes them all; stop at the round before, prune less in each round, or exclude the layer"
        )
    return kept
