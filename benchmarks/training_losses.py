"""Losses of sparse training beside those of masked dense training, from the same weights, masks and batches.

    python benchmarks/training_losses.py        the MLP of training_speed.py, 200 steps, on four batches

Stored under ``results/``: the largest difference of a step's loss. Masks stay what they are: new ones would
differ by the few connections whose scores differ by less than a rounding, and such runs part. What rounding
alone does is shown by masked dense training on another number of threads.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_rigl import ActiveSGD, RigLCallback
from machine import describe, store
from training_speed import CASES, Run, fit

STEPS, WAYS = 200, ("torch", "native", "step")
RATE = 0.05  # so that the loss falls to nothing
CASE = replace(
    CASES["mlp"],
    steps=STEPS,
    warm=0,
    optimizer=lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9, fused=True),
    active=lambda parameters: ActiveSGD(parameters, RATE, momentum=0.9, active_gradients=True),
)


class Losses(pl.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        """Note it."""
        self.found.append(float(outputs["loss"]))


def train(sparsity: float, way: str) -> list[float]:
    """The losses of a run with given masks."""
    compute: Any = "native" if way == "step" else way
    losses = Losses()
    callback = RigLCallback(sparsity, method="static", rescale="layer", seed=0, compute=compute)
    fit(CASE, Run(lambda: [callback, losses], active=way == "step"))
    return losses.found


def main() -> None:
    """Compare, print and store."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    for sparsity in CASE.sparsities:
        expected = train(sparsity, "dense")
        torch.set_num_threads(3 - threads if threads in (1, 2) else threads // 2)
        runs = {"dense, other threads": train(sparsity, "dense")}
        torch.set_num_threads(threads)
        runs |= {way: train(sparsity, way) for way in WAYS}
        for name, losses in runs.items():
            found[f"{name} {sparsity:g}"] = row = {
                "largest difference": max(abs(a - b) for a, b in zip(expected, losses, strict=True)),
                "first and last loss": [losses[0], losses[-1]],
            }
            print(f"{name} {sparsity:g}:", *(f"{key} {value}" for key, value in row.items()), sep="  ")
    store("training_losses", {"machine": describe(), "steps": STEPS, "rate": RATE, **found})


if __name__ == "__main__":
    main()
