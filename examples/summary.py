"""The demo's results as a table and as CSV files."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, system and sparsity: means over the seeds, costs as ratios to the dense net."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["system"], row["sparsity"]), []).append(row)
    summary = []
    for (model, system, sparsity), group in groups.items():
        accuracies = [row["accuracy"] for row in group]
        first, dense = group[0], groups[model, "dense", 0.0][0]
        summary.append(
            {
                "model": model,
                "system": system,
                "sparsity": sparsity,
                "widths": first["widths"],
                "runs": len(group),
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(group) > 1 else math.nan,
                "weights": first["weights"],
                "always_dense": first["always_dense"],
                "forward": first["forward"],
                "forward_ratio": first["forward"] / dense["forward"],
                "train": first["train"],
                "train_ratio": first["train"] / dense["train"],
                "seconds": statistics.mean(row["seconds"] for row in group),
            }
        )
    return summary


def table(model: str, summary: Sequence[dict[str, Any]]) -> Table:
    """The summary of one model to look at."""
    rows = [row for row in summary if row["model"] == model]
    thin = {f"{row['sparsity']:.4g}": row["widths"] for row in rows if row["system"] == "small-dense"}
    drawn = Table(
        title=f"{model} {rows[0]['widths']} (seeds: {rows[0]['runs']})",
        caption="; ".join(f"small-dense at {at}: {widths}" for at, widths in thin.items()),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    drawn.add_column("\nsystem", no_wrap=True)
    columns = ("\nsparsity", "test\naccuracy %", "active\nparameters", "inference\nFLOPs", "training\nFLOPs")
    for column in (*columns, "time\n(s)"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        drawn.add_row(
            row["system"],
            "" if "dense" in row["system"] else f"{row['sparsity']:.4g}",
            f"{row['accuracy']:.2f}" + (f" ± {row['spread']:.2f}" if row["runs"] > 1 else ""),
            f"{row['weights']:,} + {row['always_dense']:,}",
            f"{row['forward_ratio']:.3f}",
            f"{row['train_ratio']:.3f}",
            f"{row['seconds']:.1f}",
            end_section=row["sparsity"] != following["sparsity"],
        )
    return drawn


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per row, under a line of names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
