"""A total of connections shared between layers, as exact integers. No tensors, no randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def in_proportion(total: int, weights: Sequence[float]) -> list[int]:
    """Integers in proportion to ``weights`` that add up to ``total``, by largest remainder.

    Each differs from its exact share by less than 1; of equal remainders the lower index gets more. Computed
    in fractions, so that no rounding loses or adds one.

    Args:
        total: at least 0.
        weights: finite numbers of at least 0; if all are 0 they count as equal.

    Raises:
        ValueError: a weight is negative or not finite, or there is a total and no weight.

    Example:
        >>> in_proportion(10, [1.0, 1.0, 1.0]), in_proportion(4, [0.1, 0.7])
        ([4, 3, 3], [1, 3])
    """
    if not all(math.isfinite(w) and w >= 0 for w in weights) or (total and not weights):
        raise ValueError(f"shares of {total}: expected finite weights of at least 0, got {list(weights)}")
    exact = [Fraction(w) for w in weights]
    if not any(exact):
        exact = [Fraction(1)] * len(exact)
    quotas = [total * w / sum(exact) for w in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def fill(total: int, weights: Sequence[float], room: Sequence[int], evenly: bool = False) -> list[int]:
    """The same where layer i takes at most ``room[i]``: what a full one cannot take goes to the others.

    Args:
        total: from 0 to the sum of ``room``.
        weights: as in `in_proportion`, one per layer.
        room: what fits, one per layer, at least 0.
        evenly: what is left over is spread evenly (SNFS), otherwise again in proportion (DSR); in rounds,
            until all is placed.

    Raises:
        ValueError: the total does not fit.

    Example:
        >>> fill(10, [8.0, 1.0, 1.0], [4, 9, 9]), fill(10, [8.0, 2.0, 0.0], [4, 9, 9], evenly=True)
        ([4, 3, 3], [4, 4, 2])
    """
    if not 0 <= total <= sum(room):
        raise ValueError(f"asked to place {total} connections where {sum(room)} fit: {list(room)}")
    counts, shares = [0] * len(room), list(weights)
    while left := total - sum(counts):  # each round places all or fills a layer
        free = [i for i in range(len(room)) if counts[i] < room[i]]
        for i, more in zip(free, in_proportion(left, [shares[i] for i in free]), strict=True):
            counts[i] = min(counts[i] + more, room[i])
        shares = [1.0] * len(room) if evenly else shares
    return counts


def place(
    total: int, weights: Sequence[float], room: Sequence[int], spare: Sequence[int], evenly: bool = False
) -> list[int]:
    """`fill`, with a second room that is used only where the first is full in all layers.

    Example:
        >>> place(5, [1.0, 1.0], [1, 2], [9, 9])
        [2, 3]
    """
    first = fill(min(total, sum(room)), weights, room, evenly)
    second = fill(total - sum(first), weights, spare, evenly)
    return [a + b for a, b in zip(first, second, strict=True)]


def redistributed(
    active: Sequence[int], sizes: Sequence[int], importance: Sequence[float], fraction: float
) -> list[tuple[int, int]]:
    """What each layer drops and grows when the total dropped is shared by the layers' importance.

    A layer drops ceil(fraction x active), but never its last connection. One of sparsity s below 0.2 whose
    share of the importance is above 1/L drops at most s of its connections. All that is dropped grows again:
    by share, up to 0.99 of the free places of a layer, the rest spread evenly; if all layers are filled to
    0.99, up to all of them. So the total is the same before and after.

    Args:
        active: connections of each layer, at least 1.
        sizes: how many there could be.
        importance: of each layer, at least 0; if all are 0 they count as equal.
        fraction: the drop fraction, in [0, 1].

    Returns:
        (dropped, grown) of each layer.

    Example:
        >>> redistributed([10, 10], [100, 100], [3.0, 1.0], 0.5)
        [(5, 8), (5, 2)]
    """
    total = sum(importance) or 1.0
    rates = [
        min(1 - a / n, fraction) if 1 - a / n < 0.2 and i / total > 1 / len(active) else fraction
        for a, n, i in zip(active, sizes, importance, strict=True)
    ]
    dropped = [max(min(math.ceil(rate * a), a - 1), 0) for rate, a in zip(rates, active, strict=True)]
    free = [n - a + d for n, a, d in zip(sizes, active, dropped, strict=True)]
    room = [99 * places // 100 for places in free]
    spare = [places - most for places, most in zip(free, room, strict=True)]
    grown = place(sum(dropped), importance, room, spare, evenly=True)
    return list(zip(dropped, grown, strict=True))
