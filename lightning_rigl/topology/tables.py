"""A small table: plain text when printed, a rich table where rich is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the last row is the total.

    Args:
        title: what the table shows, with its unit.
        columns: the column headers.
        rows: one tuple of cells per row, as long as ``columns``.
        total: the last row, set apart.

    Example:
        >>> print(Table("two layers", ("layer", "active"), (("a", "12"), ("b", "3")), ("total", "15")))
        two layers
        layer  active
        a          12
        b           3
        -------------
        total      15
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...]

    def __str__(self) -> str:
        lines = (self.columns, *self.rows, self.total)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        text.insert(-1, "-" * len(text[0]))
        return "\n".join([self.title, *text])

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, show_footer=True)
        for i, (header, footer) in enumerate(zip(self.columns, self.total, strict=True)):
            table.add_column(header, footer, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def density_table(
    title: str,
    shapes: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """Layer, shape, active of total and density; one row per layer, and their sum.

    ``more``: header of a further column -> layer -> cell.

    Example:
        >>> print(density_table("one layer", {"fc": (10, 8)}, {"fc": 20}))
        one layer
        layer   shape    active  density
        fc     10 x 8  20 of 80   0.2500
        --------------------------------
        total          20 of 80   0.2500
    """

    def row(name: str, shape: str, active: int, size: int) -> tuple[str, ...]:
        return name, shape, f"{active:,} of {size:,}", f"{active / size:.4f}"

    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    columns = more or {}
    rows = [
        row(name, " x ".join(map(str, shape)), counts[name], sizes[name])
        + tuple(cells[name] for cells in columns.values())
        for name, shape in shapes.items()
    ]
    total = row("total", "", sum(counts.values()), sum(sizes.values())) + ("",) * len(columns)
    return Table(title, ("layer", "shape", "active", "density", *columns), tuple(rows), total)
