"""What is known of the units along one axis of a tensor, and which units must go or stay together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Units:
    """The units (neurons, channels) along one axis of a tensor that flows through a graph.

    Args:
        axis: the axis they lie along, counted from the front.
        ids: int64, one number per coordinate of the axis. Coordinates whose numbers are in one class of
            `Classes` are removed together or not at all; after a flattening several share one number.
        values: float64, as long as ``ids``: the value of the coordinate where it is the same for every input,
            sample and position, NaN where it is not.
    """

    axis: int
    ids: Tensor
    values: Tensor

    @classmethod
    def unknown(cls, axis: int, ids: Tensor) -> Units:
        """Units whose values depend on the input."""
        return cls(axis, ids, torch.full((len(ids),), UNKNOWN, dtype=torch.float64))

    def at(self, axis: int) -> Units:
        """The same units along another axis."""
        return Units(axis, self.ids, self.values)

    def with_values(self, values: Tensor) -> Units:
        """The same units with other values; what is not finite counts as unknown."""
        values = values.double()
        return Units(self.axis, self.ids, torch.where(values.isfinite(), values, UNKNOWN))


class Classes:
    """Numbers of units, joined into classes that stay or go as one (a union-find structure).

    Example:
        >>> classes = Classes()
        >>> a, b = classes.new(3), classes.new(3)
        >>> classes.join(a, b)
        >>> classes.keep(b[:1], "output of the model")
        >>> classes.roots(a).tolist() == classes.roots(b).tolist(), classes.reason(int(a[0]))
        (True, 'output of the model')
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._kept: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Numbers of ``count`` new units, each a class of its own."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make one class of each pair of units."""
        if first is second:
            return
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            root, other = self._root(a), self._root(b)
            if root != other:
                self._parents[other] = root
                if other in self._kept:
                    self._kept.setdefault(root, self._kept[other])

    def keep(self, ids: Tensor, why: str) -> None:
        """Never remove these units."""
        for root in set(self.roots(ids).tolist()):
            self._kept.setdefault(root, why)

    def roots(self, ids: Tensor) -> Tensor:
        """The number that stands for the class of each unit."""
        return torch.tensor([self._root(i) for i in ids.tolist()], dtype=torch.int64)

    def kept(self) -> set[int]:
        """The roots of the classes that are never removed."""
        return {self._root(i) for i in self._kept}

    def reason(self, unit: int) -> str | None:
        """Why a unit is never removed; None if it may be."""
        return self._kept.get(self._root(unit))

    def __len__(self) -> int:
        return len(self._parents)

    def _root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit
