"""What methods, distributions and patterns have in common: a short name for the default of each."""

from __future__ import annotations

from abc import ABC
from difflib import get_close_matches
from inspect import Parameter, isabstract, signature
from typing import TypeVar

P = TypeVar("P", bound="Part")


class Part(ABC):  # noqa: B024  what is abstract is declared by each kind
    """A choice that a name can stand for: ``"erk"`` is ``ERK()``.

    The short name of a part is its class name in lower case; it exists when the constructor needs no
    argument.
    A class of the user's own has a short name as soon as it is defined; defined again, in the same place, the
    new class takes over.
    """

    @classmethod
    def of(cls: type[P], choice: P | str) -> P:
        """Return the part that ``choice`` is or names.

        Args:
            choice: an instance, or a short name in any case.

        Raises:
            ValueError: no part of this kind has that name; the message lists the known ones.
            TypeError: ``choice`` is neither.

        Example:
            >>> from lightning_rigl.topology.distributions import Distribution
            >>> Distribution.of("erk")
            ERK(power=1.0, fixed=None)
        """
        if isinstance(choice, cls):
            return choice
        kind = cls.__name__.lower()
        if not isinstance(choice, str):
            raise TypeError(f"{kind}: expected a {cls.__name__} or a short name, got {choice!r}")
        known: dict[str, type[P]] = {}
        for part in _descendants(cls):
            name = part.__name__.lower()
            # older classes come first, so that a user's class never takes the name of one of ours
            if _has_default(part) and _place(known.setdefault(name, part)) == _place(part):
                known[name] = part
        if choice.lower() in known:
            return known[choice.lower()]()
        near = get_close_matches(choice.lower(), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{kind}: unknown name {choice!r}; the known ones are {', '.join(sorted(known))}{hint}"
        )


def _descendants(cls: type[P]) -> list[type[P]]:
    return [c for child in cls.__subclasses__() for c in (child, *_descendants(child))]


def _place(part: type[Part]) -> tuple[str, str]:
    return part.__module__, part.__qualname__


def _has_default(part: type[Part]) -> bool:
    needed = [p for p in signature(part).parameters.values() if p.default is Parameter.empty]
    return not isabstract(part) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed)
