"""Which layers gain from products that skip zeros: a model fitted to measurements.

A training step of a layer saves time in proportion to its rows and weights, up to a density at which both
products take as long; it pays some time for each weight, as if it had a few rows less, and some for the
calls. The constants were fitted to one machine (docs/speed.md) on the safe side. The choice depends on shapes
alone, so that a run does not depend on the clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DENSEST = {"native": 0.25, "torch": 0.1}  # of inference: above this density a dense product is as fast
SMALLEST = {"native": 1 << 15, "torch": 1 << 17}  # with fewer weights the calls cost more than they save
_MOST_ROWS = 1 << 13  # a layer that gains above only is dense


@dataclass(frozen=True)
class Rule:
    """Above what a layer is to compute sparsely.

    Args:
        densest: the density at which nothing is saved.
        rows: what the work for each weight costs.
        work: rows times weights that the calls cost.
    """

    densest: float
    rows: float
    work: float


SAFE = {"native": Rule(0.3, 8, 1e7), "torch": Rule(0.09, 20, 1e8)}  # never slower than dense
ASKED = {"native": Rule(0.5, 0, 1e6), "torch": Rule(0.2, 0, 1e7)}  # wherever it may gain


def least_rows(size: int, connections: int, rule: Rule) -> int | None:
    """How many rows of input make a training step of this layer gain; None if no usual number does.

    Example:
        >>> least_rows(1024 * 3072, 314_572, SAFE["native"]), least_rows(1000, 100, SAFE["native"])
        (17, None)
    """
    saved = 1 - connections / size / rule.densest
    if saved <= 0:
        return None
    rows = max(1, math.ceil((rule.work / size + rule.rows) / saved))
    return rows if rows <= _MOST_ROWS else None


def gains(outputs: int, inputs: int, connections: int, backend: str) -> bool:
    """Whether the inference of a layer of this shape is faster on a backend than dense.

    Example:
        >>> gains(1024, 3072, 314_572, "native"), gains(10, 100, 100, "native")
        (True, False)
    """
    size = outputs * inputs
    return size >= SMALLEST[backend] and connections <= DENSEST[backend] * size
