"""Which layers gain from products that skip zeros: a rule by size and density."""

from __future__ import annotations

DENSEST = {"native": 0.25, "torch": 0.1}  # above this density a dense product is as fast
SMALLEST = {"native": 1 << 15, "torch": 1 << 17}  # with fewer weights the calls cost more than they save


def gains(outputs: int, inputs: int, connections: int, backend: str) -> bool:
    """Whether a layer of this shape and number of connections is faster on a backend than dense.

    Example:
        >>> gains(1024, 3072, 314_572, "native"), gains(10, 100, 100, "native")
        (True, False)
    """
    size = outputs * inputs
    return size >= SMALLEST[backend] and connections <= DENSEST[backend] * size
