"""Shapes and a sparsity -> how many connections each layer keeps, as integers."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import TypeGuard

from lightning_rigl.topology.parts import Part

Shapes = Mapping[str, Sequence[int]]


class Distribution(Part):
    """How the budget of active connections is shared between layers."""

    @abstractmethod
    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """The number of active connections of each layer.

        A layer of size N and sparsity s keeps N - floor(s N) connections, in double precision: the rule of
        the official code. The total exceeds (1 - sparsity) x size by fewer than 2 per layer.

        Args:
            shapes: layer name -> shape as PyTorch stores it, in module order.
            sparsity: fraction of zeros over the layers of the pool, in [0, 1).

        Returns:
            Layer name -> count, in the order of ``shapes``. A layer that a rule leaves dense and outside the
            pool is absent.

        Raises:
            ValueError: a sparsity outside [0, 1), a pattern that matches no layer, or a budget that cannot be
                met; the message names the layer and the feasible maximum.
        """


@dataclass(frozen=True)
class Uniform(Distribution):
    """Every layer has the same sparsity.

    Args:
        dense_first: leave the first layer dense and outside the pool, as the RigL paper does.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, section 3.

    Example:
        >>> Uniform().counts({"a": (8, 4), "b": (10, 8)}, 0.9)
        {'b': 8}
    """

    dense_first: bool = True

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(sparsity x N) for each layer of the pool."""
        check_sparsity(sparsity)
        pool = list(shapes)[1:] if self.dense_first else list(shapes)
        if shapes and not pool:
            raise ValueError(
                f"distribution uniform: {next(iter(shapes))} is the only layer and dense_first leaves it "
                "dense; use Uniform(dense_first=False)"
            )
        return {name: _count(name, shapes[name], sparsity) for name in pool}


@dataclass(frozen=True)
class ER(Distribution):
    """Erdos-Renyi: the density of a layer is proportional to (n_in + n_out) / (n_in n_out).

    Layers whose density would exceed 1 become dense and the others pay for them.

    Reference:
        Mocanu et al., *Scalable training of artificial neural networks with adaptive sparse connectivity
        inspired by network science*, Nature Communications 2018, arXiv:1707.04780.

    Example:
        >>> ER().counts({"a": (300, 784), "b": (100, 300), "c": (10, 100)}, 0.9)
        {'a': 18715, 'b': 6906, 'c': 1000}
    """

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) with s_l = 1 - eps (n_in + n_out) / (n_in n_out)."""
        return _balanced(shapes, sparsity, lambda shape: sum(shape[:2]) / math.prod(shape[:2]), {})


@dataclass(frozen=True)
class ERK(Distribution):
    """Erdos-Renyi-Kernel: the density of a layer is proportional to (sum of dimensions / size) ^ power.

    Layers whose density would exceed 1 become dense and the others pay for them. At the same sparsity it
    costs about twice the FLOPs of `Uniform` on ResNet-50.

    Args:
        power: 1 is ERK, 0 makes all densities equal.
        fixed: regular expression (searched in the parameter name, first match wins) -> sparsity of that layer
            in [0, 1). These layers take no part in the balance and are not compensated.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, section 3.

    Example:
        >>> ERK().counts({"a": (300, 784), "b": (100, 300), "c": (10, 100)}, 0.9)
        {'a': 18715, 'b': 6906, 'c': 1000}
        >>> ERK(fixed={"^a$": 0.5}).counts({"a": (300, 784), "b": (100, 300), "c": (10, 100)}, 0.9)
        {'a': 117600, 'b': 2432, 'c': 669}
    """

    power: float = 1.0
    fixed: dict[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not _is_number(self.power) or not math.isfinite(self.power):
            raise TypeError(f"distribution erk, power: a number, got {self.power!r}")
        check_rules(self.fixed or {}, "distribution erk, fixed")

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) with s_l = 1 - eps (sum(shape) / size) ^ power."""
        given = match(self.fixed or {}, shapes, "distribution erk, fixed")
        return _balanced(shapes, sparsity, lambda shape: (sum(shape) / math.prod(shape)) ** self.power, given)


@dataclass(frozen=True)
class PerLayer(Distribution):
    """Each layer's sparsity is given; layers that no pattern matches stay dense, outside the pool.

    Args:
        sparsities: regular expression (searched in the parameter name, first match wins) -> sparsity in
            [0, 1). The overall ``sparsity`` has no say.

    Example:
        >>> PerLayer({"^a": 0.9, ".": 0.5}).counts({"a": (10, 10), "b": (2, 4)}, 0.0)
        {'a': 10, 'b': 4}
    """

    sparsities: dict[str, float] = field(hash=False)

    def __post_init__(self) -> None:
        check_rules(self.sparsities, "sparsity")

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) with the given s_l."""
        given = match(self.sparsities, shapes, "sparsity")
        return {name: _count(name, shapes[name], s) for name, s in given.items()}


def check_sparsity(sparsity: object) -> None:
    """Raise ValueError unless ``sparsity`` lies in [0, 1)."""
    if not _is_number(sparsity) or not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity is the fraction of zeros and must lie in [0, 1), got {sparsity!r}")


def check_rules(rules: object, what: str) -> None:
    """Raise unless ``rules`` maps strings to sparsities in [0, 1)."""
    if not isinstance(rules, Mapping) or not all(isinstance(pattern, str) for pattern in rules):
        raise TypeError(f"{what}: expected a dict of regular expression -> sparsity, got {rules!r}")
    for sparsity in rules.values():
        check_sparsity(sparsity)


def match(rules: Mapping[str, float], names: Iterable[str], what: str) -> dict[str, float]:
    """Give each name the value of the first pattern that is found in it; names without one are absent.

    Raises:
        ValueError: a pattern is no regular expression, or is found in no name; the message shows near misses.

    Example:
        >>> match({"conv": 0.5, ".": 0.9}, ["conv1.weight", "fc.weight"], "sparsity")
        {'conv1.weight': 0.5, 'fc.weight': 0.9}
    """
    names = list(names)
    for pattern in rules:
        find(pattern, names, what)
    first = {name: next((p for p in rules if re.search(p, name)), None) for name in names}
    return {name: rules[pattern] for name, pattern in first.items() if pattern is not None}


def find(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names in which a regular expression is found; ValueError with near misses if there are none."""
    if not isinstance(pattern, str):
        raise TypeError(f"{what}: expected a regular expression, got {pattern!r}")
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from error
    if not found:
        plain = re.sub(r"[\\^$.*+?()\[\]{}|]+", ".", pattern).strip(".")
        near = get_close_matches(plain, names, 3, 0.4) or list(names[:3])
        raise ValueError(
            f"{what}: {pattern!r} matches no layer; near misses: {', '.join(near) or 'there are none'}"
        )
    return found


def _is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _count(name: str, shape: Sequence[int], sparsity: float) -> int:
    size = math.prod(shape)
    count = size - math.floor(sparsity * size)
    if count < 1:
        raise ValueError(
            f"{name}: asked to keep {count} of {size} connections (sparsity {sparsity!r}); "
            f"at least 1 must stay, so the sparsity can be at most {1 - 1 / size!r}"
        )
    return count


def _balanced(
    shapes: Shapes, sparsity: float, raw_density: Callable[[Sequence[int]], float], given: Mapping[str, float]
) -> dict[str, int]:
    """Densities eps x raw with one eps for the pool; whatever exceeds 1 becomes dense, then eps anew."""
    check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    pool = [name for name in shapes if name not in given]
    total = sum(sizes[name] for name in pool)
    if (1 - sparsity) * total < len(pool) and total:
        raise ValueError(
            f"sparsity {sparsity!r} leaves {(1 - sparsity) * total:.3g} of {total} connections to "
            f"{len(pool)} layers; with one in each the sparsity can be at most {1 - len(pool) / total!r}"
        )
    budget = sum(sizes[name] - math.floor(sparsity * sizes[name]) for name in pool)
    raw = {name: raw_density(shapes[name]) for name in pool}
    eps = 0.0
    while raw:
        eps = budget / sum(raw[name] * sizes[name] for name in raw)
        highest = max(raw.values())
        if highest * eps <= 1:
            break
        saturated = [name for name in raw if raw[name] == highest]
        budget -= sum(sizes[name] for name in saturated)
        for name in saturated:
            del raw[name]
    own = {name: 1 - eps * raw[name] if name in raw else 0.0 for name in pool}
    return {name: _count(name, shapes[name], given[name] if name in given else own[name]) for name in shapes}
