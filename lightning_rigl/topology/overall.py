"""One count for several layers together: how many connections each loses to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rigl.topology import selection


def drops(scores: Sequence[Tensor], active: Sequence[Tensor], count: int) -> list[int]:
    """How many connections each layer drops if the ``count`` highest-scored of all layers stay.

    Of equal scores the earlier layer wins, and in a layer the lower flat index, so that dropping the lowest
    of each layer gives the same connections. A layer may lose all of its own.

    Args:
        scores: of each layer, any shapes.
        active: bool, the shapes of ``scores``; True where a connection may stay.
        count: how many stay, at least 0; if there are fewer, all do.

    Raises:
        ValueError: a negative ``count``.

    Example:
        >>> first, second = torch.tensor([0.9, 0.1, 0.5]), torch.tensor([[0.7], [0.2]])
        >>> drops([first, second], [first > 0, second > 0], 3)
        [1, 1]
    """
    stay = highest(scores, active, min(count, sum(int(mask.count_nonzero()) for mask in active)))
    return [int((mask ^ kept).count_nonzero()) for mask, kept in zip(active, stay, strict=True)]


def highest(scores: Sequence[Tensor], among: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` highest-scored connections of all layers; shapes and ties as in `drops`.

    Raises:
        ValueError: there are fewer candidates than ``count``, or it is negative.
    """
    if not scores:
        return []
    device = scores[0].device
    ranked = torch.cat([score.detach().reshape(-1).to(device) for score in scores])
    chosen = selection.top(ranked, count, torch.cat([mask.reshape(-1).to(device) for mask in among]))
    parts = torch.split(chosen, [mask.numel() for mask in among])
    return [part.view(mask.shape).to(mask.device) for part, mask in zip(parts, among, strict=True)]


def freeze(flags: int, size: int, target: int, before: float, now: float) -> int:
    """How many flags an update clears: ceil((1 - d^(now - before)) flags), d = target / size.

    Args:
        flags: those that are set.
        size: all.
        target: how many are to be set in the end, at most ``flags``; they never become fewer.
        before: progress of the last update, in [0, 1].
        now: progress of this one; 1 clears all but the target.

    Example:
        >>> freeze(1000, 1000, 100, 0.0, 0.5), freeze(316, 1000, 100, 0.5, 1.0)
        (684, 216)
    """
    if now >= 1:
        return flags - target
    share = -math.expm1(math.log(target / size) * max(now - before, 0.0))
    whole = math.ceil(share * flags * (1 - 1e-12))  # rounding must not make 51 of 50
    return min(whole, flags - target)
