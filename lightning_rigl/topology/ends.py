"""A sparsity of its own for the first and for the last layer, beside any distribution."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rigl.topology.distributions import Distribution, Shapes, Uniform, check_sparsity
from lightning_rigl.topology.smart_ratio import SmartRatio


@dataclass(frozen=True)
class Ends(Distribution):
    """The first layer, the last, or both have a sparsity of their own; the rest is shared by a distribution.

    First and last are those of the sparse layers in module order. They take no part in the budget, and the
    rest is not changed to make up for them: it has the ``sparsity`` that is asked for. A fixed layer keeps
    N - floor(s N) connections. With a sparsity of 0 it is dense, and counts as a sparse layer all the same.

    In ``Uniform(dense_first=True)`` the dense first layer is no sparse layer, so it does not count.

    Args:
        rest: how the other layers share the connections: erk, er, or a Distribution.
        first: sparsity of the first layer, in [0, 1); None leaves it to ``rest``.
        last: sparsity of the last layer, in [0, 1); None leaves it to ``rest``.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134: ERK at 99 % keeps the first layer
        of ResNet-50 dense.

    Example:
        >>> lenet = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
        >>> Ends(last=0.0).counts(lenet, 0.9)
        {'a': 19372, 'b': 7149, 'c': 1000}
        >>> Ends(Uniform(dense_first=False), first=0.99, last=0.5).counts(lenet, 0.9)
        {'a': 2352, 'b': 3000, 'c': 500}
    """

    rest: Distribution | str = "erk"
    first: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        rule = Distribution.of(self.rest)
        object.__setattr__(self, "rest", rule)
        for end, sparsity in (("first", self.first), ("last", self.last)):
            if sparsity is not None:
                _check(end, sparsity, rule)

    def counts(self, shapes: Shapes, sparsity: float) -> dict[str, int]:
        """N - floor(s_l N) for the fixed layers; those of ``rest`` for the others, as if they were all.

        Raises:
            ValueError: there is one layer and both ends are given; or what ``rest`` refuses of the others.
        """
        check_sparsity(sparsity)
        names = list(shapes)
        if len(names) == 1 and self.first is not None and self.last is not None:
            raise ValueError(
                f"distribution ends: {names[0]} is the only layer, so both first={self.first!r} and "
                f"last={self.last!r} are its sparsity; give one of them"
            )
        ends = zip(names[:1] + names[-1:], (self.first, self.last), strict=False)
        fixed = {name: own for name, own in ends if own is not None}
        kept = {
            name: Uniform(dense_first=False).counts({name: shapes[name]}, own)[name]
            for name, own in fixed.items()
        }
        rest = {name: shape for name, shape in shapes.items() if name not in fixed}
        kept |= Distribution.of(self.rest).counts(rest, sparsity)
        return {name: kept[name] for name in names if name in kept}


def _check(end: str, sparsity: float, rule: Distribution) -> None:
    try:
        check_sparsity(sparsity)
    except ValueError as error:
        raise ValueError(f"distribution ends, {end}: {error}") from None
    if end in _decided(rule):
        raise ValueError(
            f"distribution ends: {end}={sparsity!r} and rest={rule!r} both decide the {end} layer; leave "
            f"{end} out, or choose a `rest` that has no rule for it, like Uniform(dense_first=False)"
        )


def _decided(rule: Distribution) -> set[str]:
    """The ends for which a distribution has its own rule, which it would apply to the next layer instead."""
    if isinstance(rule, Ends):
        own = {end for end, sparsity in (("first", rule.first), ("last", rule.last)) if sparsity is not None}
        return own | _decided(Distribution.of(rule.rest))
    if isinstance(rule, SmartRatio):
        return {"last"}
    return {"first"} if isinstance(rule, Uniform) and rule.dense_first else set()
