"""A report of what a model and its training cost, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_rigl.flops.formulas import Convention, CostTable
from lightning_rigl.topology.tables import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class LayerFLOPs:
    """One row of a report: FLOPs per sample and forward pass, sparse and dense, of one parameter."""

    name: str
    shape: tuple[int, ...]
    active: int
    total: int
    forward: int
    forward_dense: int


@dataclass(frozen=True)
class FLOPsReport:
    """What a model costs now and what its training has cost so far.

    Args:
        layers: one row per parameter.
        other: FLOPs per sample of products without a parameter.
        train: FLOPs of training so far, on this device.
        train_dense: what the dense model would have cost for the same samples.
        convention: how FLOPs are counted, see `forward_cost`.
        unknown: operators that read a weight and are not counted.

    Example:
        >>> from lightning_rigl.flops.formulas import LayerCost
        >>> table = CostTable((LayerCost("fc.weight", (10, 100), forward=2000, outputs=10),), other=64)
        >>> print(report(table, {"fc.weight": 50}, train=4920, train_dense=61920))
        FLOPs per sample and forward pass (2mac: FLOP = one multiply or one add)
        training so far: 4,920 of 61,920 FLOPs if dense (0.0795)
        layer            shape  active  forward  dense   ratio
        fc.weight       10x100      50      100  2,000  0.0500
        (no parameter)                       64     64  1.0000
        ------------------------------------------------------
        total                       50      164  2,064  0.0795
    """

    layers: tuple[LayerFLOPs, ...]
    other: int
    train: int
    train_dense: int
    convention: Convention = "2mac"
    unknown: tuple[str, ...] = ()

    @property
    def forward(self) -> int:
        """FLOPs per sample of one forward pass of the sparse model, f_S."""
        return self.other + sum(layer.forward for layer in self.layers)

    @property
    def forward_dense(self) -> int:
        """FLOPs per sample of one forward pass of the dense model, f_D."""
        return self.other + sum(layer.forward_dense for layer in self.layers)

    @property
    def forward_ratio(self) -> float:
        """f_S / f_D."""
        return ratio(self.forward, self.forward_dense)

    @property
    def train_ratio(self) -> float:
        """Training so far as a share of what the dense model would have cost."""
        return ratio(self.train, self.train_dense)

    def table(self) -> Table:
        """The report as a table whose rows add up to its total."""
        rows = [_cells(r.name, r.shape, r.active, r.forward, r.forward_dense) for r in self.layers]
        if self.other:
            rows.append(_cells("(no parameter)", (), None, self.other, self.other))
        active = sum(row.active for row in self.layers)
        train = f"{self.train:,} of {self.train_dense:,} FLOPs if dense ({self.train_ratio:.4f})"
        title = [
            f"FLOPs per sample and forward pass ({self.convention}: FLOP = one multiply or one add)",
            f"training so far: {train}",
            *([f"not counted: {', '.join(self.unknown)}"] if self.unknown else []),
        ]
        columns = ("layer", "shape", "active", "forward", "dense", "ratio")
        total = _cells("total", (), active, self.forward, self.forward_dense)
        return Table("\n".join(title), columns, tuple(rows), total)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> RichTable:
        return self.table().__rich__()


def report(
    table: CostTable,
    counts: Mapping[str, int],
    train: int,
    train_dense: int,
    convention: Convention = "2mac",
) -> FLOPsReport:
    """The cost of each layer at these active counts, beside the totals of training."""
    layers = []
    for layer in table.layers:
        active = counts.get(layer.name, layer.numel)
        sparse, dense = (layer.flops(count, convention) for count in (active, layer.numel))
        layers.append(LayerFLOPs(layer.name, layer.shape, active, layer.numel, sparse, dense))
    return FLOPsReport(tuple(layers), table.other, train, train_dense, convention, table.unknown)


def ratio(sparse: int, dense: int) -> float:
    """A share of the dense cost; 1 where the dense model costs nothing."""
    return sparse / dense if dense else 1.0


def _cells(
    name: str, shape: tuple[int, ...], active: int | None, forward: int, dense: int
) -> tuple[str, ...]:
    count = "" if active is None else f"{active:,}"
    return (
        name,
        "x".join(map(str, shape)),
        count,
        f"{forward:,}",
        f"{dense:,}",
        f"{ratio(forward, dense):.4f}",
    )
