"""How many bytes a sparse model needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def model_bytes(weights: Mapping[str, Sequence[int]], counts: Mapping[str, int], others: int) -> int:
    """The size of a model in bytes: float32 values of what is active, and a bit mask.

    Four bytes for each active weight, one bit for each weight of a layer that is not dense, four bytes for
    each other parameter, and the last byte is filled up.

    Args:
        weights: shapes of the weights, by name.
        counts: active connections by name; what is not named is dense.
        others: number of all other parameters.

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134: the sizes published with the official code, which takes one
        bias per output channel as the only other parameters: 102.122 MB for the dense ResNet-50.

    Example:
        >>> model_bytes({"a": (300, 784), "b": (10, 300)}, {"a": 23520}, others=310)
        136720
    """
    bits = 32 * others
    for name, shape in weights.items():
        size = math.prod(shape)
        active = counts.get(name, size)
        bits += 32 * active + (size if active < size else 0)
    return math.ceil(bits / 8)
