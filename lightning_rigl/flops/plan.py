"""What a sparse training will cost, layer by layer and in all, before it starts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_rigl.flops.closed_forms import mean_step, training_ratios
from lightning_rigl.flops.costs import Convention, CostTable
from lightning_rigl.flops.formulas import RunCost, SampleCost
from lightning_rigl.flops.report import LayerFLOPs, ratio
from lightning_rigl.flops.runs import Gradient, Stage, budget_in_flops, longest_run, run_cost, updates_due
from lightning_rigl.topology.schedules import UpdateSchedule
from lightning_rigl.topology.tables import Table

NOMINAL = 32_000  # steps


@dataclass(frozen=True)
class FLOPsPlan:
    """What a model costs at a sparsity, and what its training will cost with each method.

    Made by `plan_flops`. Three totals of training are told apart: ``train`` of `run` sums 3 f_S a step and
    2 f_S + f_D an update over the real schedule; its ``train_actual`` sums the products that autograd runs
    (always by ``2mac``); `training` has the closed forms of appendix H, means over an endless run.

    Args:
        layers: one row per parameter that takes part in a product.
        cost: FLOPs of one sample.
        other: FLOPs per sample of products without a parameter; never scaled.
        sparsity: fraction of zeros that was asked for.
        distribution: how the connections are shared between layers, in words.
        method: name of the method.
        gradient: when the method reads the gradient of inactive connections.
        schedule: when the topology is updated; None: never.
        every: steps between the updates of RigL in the closed forms.
        bytes_dense: size of the dense model, see `size.model_bytes`.
        bytes_sparse: size of the sparse model.
        batch_size: samples per optimizer step.
        steps: length of training in optimizer steps; None: unknown.
        budget: FLOPs that decided the length; None: it was given.
        convention: how FLOPs are counted, see `forward_cost`.
        unknown: operators that read a weight and are not counted.
        unseen: sparse layers that took part in no product.
        stage: what a sample costs after the update at a progress, of a method that starts dense.
    """

    layers: tuple[LayerFLOPs, ...]
    cost: SampleCost
    other: int
    sparsity: float
    distribution: str
    method: str
    gradient: Gradient
    schedule: UpdateSchedule | None
    every: int
    bytes_dense: int
    bytes_sparse: int
    batch_size: int = 1
    steps: int | None = None
    budget: int | None = None
    convention: Convention = "2mac"
    unknown: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    stage: Stage | None = field(default=None, compare=False, repr=False)

    @property
    def forward_ratio(self) -> float:
        """f_S / f_D, the inference FLOPs as a share of the dense model's."""
        return ratio(self.cost.forward, self.cost.forward_dense)

    @property
    def training(self) -> dict[str, float]:
        """Training FLOPs of every method as a share of the dense model's, by the closed forms."""
        return training_ratios(self.cost.forward, self.cost.forward_dense, self.every)

    @property
    def training_ratio(self) -> float:
        """That of the plan's own method: by its schedule if ``steps`` are known, else by its closed form.

        One that starts dense has none for every schedule: it is that of a training of 32,000 steps.
        """
        run = self._run(NOMINAL) if self.stage and not self.run else self.run
        if run:
            return ratio(run.train, run.train_dense)
        mean = mean_step(self.cost.forward, self.cost.forward_dense, self.gradient, self.every)
        return float(mean / (3 * self.cost.forward_dense)) if self.cost.forward_dense else 1.0

    @property
    def run(self) -> RunCost | None:
        """The cost of all steps by the real schedule; None if their number is unknown."""
        if self.steps is None:
            return None
        return self._run(self.steps)

    def _run(self, steps: int) -> RunCost:
        return run_cost(self.cost, steps, self.gradient, self.schedule, self.batch_size, self.stage)

    @property
    def updates(self) -> int | None:
        """Topology updates among the steps; None if their number is unknown."""
        return None if self.steps is None else updates_due(self.schedule, self.steps)

    def within(self, budget: str | float) -> FLOPsPlan:
        """The same training, as long as a budget pays for: the most steps whose ``train`` stays within it.

        Args:
            budget: FLOPs, or a multiple of what ``steps`` of the dense model cost, as ``"1.0x"``.

        Raises:
            ValueError: no budget, one that does not pay for a step, or a multiple of an unknown length.
        """
        flops = budget_in_flops(budget, 3 * self.cost.forward_dense * self.batch_size, self.steps)
        steps = longest_run(flops, self.cost, self.gradient, self.schedule, self.batch_size, self.stage)
        return replace(self, steps=steps, budget=flops)

    def layer_table(self) -> Table:
        """The layers, their densities and their FLOPs; the rows add up to the total."""
        rows = [_cells(r.name, r.shape, r.active, r.total, r.forward, r.forward_dense) for r in self.layers]
        if self.other:
            rows.append(_cells("(no parameter)", (), None, 0, self.other, self.other))
        sums = sum(r.active for r in self.layers), sum(r.total for r in self.layers)
        total = _cells("total", (), *sums, self.cost.forward, self.cost.forward_dense)
        title = [
            f"{self.distribution} at sparsity {self.sparsity:.6g}",
            f"FLOPs per sample and forward pass ({self.convention}: FLOP = one multiply or one add)",
            *([f"not counted: {', '.join(self.unknown)}"] if self.unknown else []),
            *([f"sparse, but in no product: {', '.join(self.unseen)}"] if self.unseen else []),
        ]
        columns = ("layer", "shape", "active", "density", "forward", "dense", "ratio")
        return Table("\n".join(title), columns, tuple(rows), total)

    def training_table(self) -> Table:
        """Training FLOPs of every method, by the closed forms."""
        rows = [(_label(method, self.every), f"{share:.4f}") for method, share in self.training.items()]
        title = "training FLOPs as a share of the dense model's (closed forms of appendix H)"
        return Table(title, ("method", "ratio"), tuple(rows[:-1]), rows[-1])

    def __str__(self) -> str:
        share = ratio(self.bytes_sparse, self.bytes_dense)
        size = (
            f"size: {self.bytes_sparse:,} bytes of {self.bytes_dense:,} if dense ({share:.4f}); "
            "float32, and one bit per weight of a sparse layer"
        )
        return "\n\n".join([str(self.layer_table()), str(self.training_table()), *self._run_in_words(), size])

    def _run_in_words(self) -> list[str]:
        if not self.run:
            return []
        share = ratio(self.run.train, self.run.train_dense)
        length = (
            f"{self.method}, {self.steps:,} steps of {self.batch_size:,} samples, {self.updates:,} updates"
        )
        if self.budget is not None:
            length += f": the most within {self.budget:,} FLOPs"
        return [
            f"{length}\n"
            f"train:        {self.run.train:,} FLOPs of {self.run.train_dense:,} if dense ({share:.4f})\n"
            f"train_actual: {self.run.train_actual:,} FLOPs in products that autograd runs"
        ]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, in plain types."""
        run = asdict(self.run) if self.run else {}
        return {
            "convention": self.convention,
            "sparsity": self.sparsity,
            "distribution": self.distribution,
            "method": self.method,
            "layers": [asdict(row) | {"shape": list(row.shape)} for row in self.layers],
            "other": self.other,
            "forward": self.cost.forward,
            "forward_dense": self.cost.forward_dense,
            "forward_ratio": self.forward_ratio,
            "training_ratios": self.training,
            "training_ratio": self.training_ratio,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "updates": self.updates,
            "budget": self.budget,
            **{name: run.get(name) for name in ("train", "train_dense", "train_actual")},
            "bytes": self.bytes_sparse,
            "bytes_dense": self.bytes_dense,
            "unknown": list(self.unknown),
            "unseen": list(self.unseen),
        }

    def to_json(self) -> str:
        """All numbers."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """The layers and their total: name, shape, active and total connections, FLOPs forward and dense."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("layer", "shape", "active", "total", "forward", "forward_dense"))
        for r in self.layers:
            shape = "x".join(map(str, r.shape))
            writer.writerow((r.name, shape, r.active, r.total, r.forward, r.forward_dense))
        if self.other:
            writer.writerow(("(no parameter)", "", "", "", self.other, self.other))
        sums = sum(r.active for r in self.layers), sum(r.total for r in self.layers)
        writer.writerow(("total", "", *sums, self.cost.forward, self.cost.forward_dense))
        return file.getvalue()


def layer_rows(table: CostTable, counts: Mapping[str, int], convention: Convention) -> tuple[LayerFLOPs, ...]:
    """What each row of a table costs at these counts, beside the dense one."""
    return tuple(
        LayerFLOPs(
            layer.key,
            layer.shape,
            layer.active(counts),
            layer.numel,
            layer.forward_flops(counts, convention),
            layer.forward_flops({}, convention),
        )
        for layer in table.layers
    )


def _cells(
    name: str, shape: tuple[int, ...], active: int | None, size: int, forward: int, dense: int
) -> tuple[str, ...]:
    connections = ("", "") if active is None else (f"{active:,}", f"{ratio(active, size):.4f}")
    flops = (f"{forward:,}", f"{dense:,}", f"{ratio(forward, dense):.4f}")
    return (name, "x".join(map(str, shape)), *connections, *flops)


def _label(method: str, every: int) -> str:
    return f"rigl, every {every} steps" if method == "rigl" else method.replace("_", " ")
