"""Which layers of an exported model skip their zeros, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_rigl.topology.tables import Table, density_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_NAMED = 3  # layers that are named for a reason; the others are counted


@dataclass(frozen=True)
class SparseReport:
    """Layers of a model and who computes them.

    Args:
        shapes: layer -> shape of its weight; linear layers and convolutions.
        counts: layer -> how many of its weights are not zero.
        backends: layer -> ``native``, ``torch`` or ``dense``.
        reasons: layer that stays dense -> why.
        words: what else a user should know; empty if nothing.

    Example:
        >>> shapes, counts = {"up": (512, 512), "head": (10, 512)}, {"up": 26214, "head": 5120}
        >>> backends, reasons = {"up": "native", "head": "dense"}, {"head": "too dense or too small to gain"}
        >>> print(SparseReport(shapes, counts, backends, reasons))
        exported for sparse products
        dense: head (too dense or too small to gain)
        layer      shape             active  density  backend
        up     512 x 512  26,214 of 262,144   0.1000   native
        head    10 x 512     5,120 of 5,120   1.0000    dense
        -----------------------------------------------------
        total             31,334 of 267,264   0.1172
    """

    shapes: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, int]
    backends: Mapping[str, str]
    reasons: Mapping[str, str]
    words: str = ""

    @property
    def sparse(self) -> tuple[str, ...]:
        """The layers whose zeros are skipped."""
        return tuple(name for name, backend in self.backends.items() if backend != "dense")

    def table(self) -> Table:
        """One row per layer, and their sum; why layers stay dense stands in the title."""
        layers: dict[str, list[str]] = {}
        for name, why in self.reasons.items():
            layers.setdefault(why, []).append(name or "the model")
        title = ["exported for sparse products", *([self.words] if self.words else [])]
        title += [f"dense: {_some(names)} ({why})" for why, names in layers.items()]
        shapes = {name: shape for name, shape in self.shapes.items() if 0 not in shape}
        if not shapes:
            return Table("\n".join(title), ("layer",), (), ("no linear layer and no convolution",))
        more = {"backend": self.backends}
        return density_table("\n".join(title), shapes, self.counts, more)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> RichTable:
        return self.table().__rich__()


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
