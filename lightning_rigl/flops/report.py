"""A report of what a model and its training cost, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_rigl.flops.costs import Convention, CostTable
from lightning_rigl.flops.formulas import RunCost, forward_cost
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
        layers: one row per parameter, or per slice that has products of its own.
        other: FLOPs per sample of products without a parameter.
        run: the totals of training so far, on this device.
        convention: how FLOPs are counted, see `forward_cost`; ``train_actual`` is always in multiply-adds.
        unknown: operators that read a weight and are not counted.
        inference: FLOPs per sample of ``validation_step`` in evaluation mode; None if not measured.
        all_devices: ``train`` of all devices, at the last epoch end of a distributed run.

    Example:
        >>> from lightning_rigl.flops.costs import LayerCost
        >>> from lightning_rigl.flops.formulas import sample_cost
        >>> table = CostTable((LayerCost("fc.weight", (10, 100), 2000, 10, 0, 2000),), other=64)
        >>> run = RunCost().after(10, sample_cost(table, {"fc.weight": 50}))
        >>> print(report(table, {"fc.weight": 50}, run))
        FLOPs per sample and forward pass (2mac: FLOP = one multiply or one add)
        training so far: 4,920 of 61,920 FLOPs if dense (0.0795); really run: 2,640
        layer            shape  active  forward  dense   ratio
        fc.weight       10x100      50      100  2,000  0.0500
        (no parameter)                       64     64  1.0000
        ------------------------------------------------------
        total                       50      164  2,064  0.0795
    """

    layers: tuple[LayerFLOPs, ...]
    other: int
    run: RunCost
    convention: Convention = "2mac"
    unknown: tuple[str, ...] = ()
    inference: int | None = None
    all_devices: int | None = None

    @property
    def train(self) -> int:
        """FLOPs of training so far on this device, by the paper's rule: backward = 2 x forward."""
        return self.run.train

    @property
    def train_dense(self) -> int:
        """What the dense model would have cost for the same samples."""
        return self.run.train_dense

    @property
    def train_actual(self) -> int:
        """FLOPs of the products that autograd really ran."""
        return self.run.train_actual

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
        columns = ("layer", "shape", "active", "forward", "dense", "ratio")
        total = _cells("total", (), active, self.forward, self.forward_dense)
        return Table("\n".join(self._title()), columns, tuple(rows), total)

    def _title(self) -> list[str]:
        train = f"{self.train:,} of {self.train_dense:,} FLOPs if dense ({self.train_ratio:.4f})"
        title = [
            f"FLOPs per sample and forward pass ({self.convention}: FLOP = one multiply or one add)",
            f"training so far: {train}; really run: {self.train_actual:,}",
        ]
        if self.all_devices is not None:
            title.append(f"training so far, all devices, at the last epoch end: {self.all_devices:,}")
        if self.inference is not None and self.inference != self.forward:
            title.append(f"validation step in evaluation mode: {self.inference:,} per sample")
        if self.unknown:
            title.append(f"not counted: {', '.join(self.unknown)}")
        return title

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> RichTable:
        return self.table().__rich__()


def report(
    table: CostTable,
    counts: Mapping[str, int],
    run: RunCost,
    convention: Convention = "2mac",
    inference: CostTable | None = None,
    all_devices: int | None = None,
) -> FLOPsReport:
    """The cost of each layer at these active counts, beside the totals of training."""
    layers, table = [], table.per_sample()
    for layer in (row for row in table.layers if row.forward or not row.no_gradient):  # a teacher has no row
        sparse, dense = (layer.forward_flops(at, convention) for at in (counts, {}))
        active = layer.active(counts)
        layers.append(LayerFLOPs(layer.key, layer.shape, active, layer.numel, sparse, dense))
    evaluated = None if inference is None else forward_cost(inference.per_sample(), counts, convention)
    return FLOPsReport(tuple(layers), table.other, run, convention, table.unknown, evaluated, all_devices)


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
