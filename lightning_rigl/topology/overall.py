"""One count for several layers together: how many connections each loses to it."""

from __future__ import annotations

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
    if not scores:
        return []
    device = scores[0].device
    among = torch.cat([mask.reshape(-1).to(device) for mask in active])
    ranked = torch.cat([score.detach().reshape(-1).to(device) for score in scores])
    available = int(among.count_nonzero())
    lost = among ^ selection.top(ranked, min(count, available), among)
    return [int(part.count_nonzero()) for part in torch.split(lost, [mask.numel() for mask in active])]
