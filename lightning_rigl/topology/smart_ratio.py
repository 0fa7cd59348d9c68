"""Smart-ratio: layers become sparser towards the output, by a formula that looks at nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from lightning_rigl.topology.distributions import Distribution, Shapes, check_sparsity


@dataclass(frozen=True)
class SmartRatio(Distribution):
    """The density of layer l of L is proportional to (L - l + 1)^2 + (L - l + 1); the last has its own.

    Layers count in module order, from 1. What a layer would have above a density of 1 goes to the next one,
    and from there on; the last layer takes nothing of it. Of N connections with sparsity s_l a layer keeps
    N - floor(s_l N), so the total exceeds (1 - sparsity) x size by less than 1 per layer.

    Made for random tickets, whose masks never see data. For VGG the authors also divide by l^2, which is not
    done here.

    Args:
        last: density of the last layer, in (0, 1].

    Reference:
        Su et al., *Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot*, NeurIPS 2020,
        arXiv:2009.11094.

    Example:
        Two layers share 26,620 - 300 connections, 12 : 6 by density:

        >>> SmartRatio().counts({"a": (300, 784), "b": (100, 300), "c": (10, 100)}, 0.9)
        {'a': 24743, 'b': 1578, 'c': 300}
    """

    last: float = 0.3

    def __post_init__(self) -> None:
        last: object = self.last
        if isinstance(last, bool) or not isinstance(last, Real):
            raise TypeError(f"distribution smartratio, last: a number, got {self.last!r}")
        if not 0 < self.last <= 1:
            raise ValueError(
                f"distribution smartratio, last: a density, which must lie in (0, 1], got {self.last!r}"
            )

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) with the given s_l of the last layer and those of the formula for all others.

        Raises:
            ValueError: there is one layer only, or the other layers would have fewer than one connection each
                or more than all; the message names the sparsities that are possible.
        """
        check_sparsity(sparsity)
        if not shapes:
            return {}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        *others, end = sizes
        if not others:
            raise ValueError(
                f"distribution smartratio: {end} is the only layer and has the density last={self.last!r}, "
                "whatever the sparsity; use Uniform(dense_first=False)"
            )
        own = sizes[end] - math.floor((1 - self.last) * sizes[end])
        self._check_budget(sizes, end, own, sparsity)
        budget = (1 - sparsity) * sum(sizes.values()) - own
        shares = _shares([sizes[name] for name in others], budget)
        kept = {
            name: sizes[name] - math.floor((1 - share) * sizes[name])
            for name, share in zip(others, shares, strict=True)
        }
        return {**kept, end: own}

    def _check_budget(self, sizes: dict[str, int], end: str, own: int, sparsity: float) -> None:
        total = sum(sizes.values())
        most = 1 - (own + len(sizes) - 1) / total
        least = (sizes[end] - own) / total
        if not least <= sparsity <= most:
            raise ValueError(
                f"distribution smartratio: sparsity {sparsity!r} leaves {(1 - sparsity) * total:.7g} "
                f"connections to {len(sizes)} layers of {total}, and {end} alone keeps {own} of {sizes[end]} "
                f"(last={self.last!r}); with at least one and at most all in each other layer the sparsity "
                f"can be {least!r} to {most!r}: change it, or last"
            )


def _shares(sizes: list[int], budget: float) -> list[float]:
    """Densities in proportion k^2 + k, k = 2 at the end; what exceeds 1 goes to the next layer."""
    ranks = range(len(sizes) + 1, 1, -1)
    raw = [k * k + k for k in ranks]
    scale = budget / sum(r * size for r, size in zip(raw, sizes, strict=True))
    shares, surplus = [], 0.0
    for r, size in zip(raw, sizes, strict=True):
        wanted = scale * r * size + surplus
        shares.append(min(wanted / size, 1.0))
        surplus = max(wanted - size, 0.0)
    return shares
