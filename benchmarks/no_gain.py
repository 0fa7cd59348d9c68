"""What ``compute="auto"`` costs where zeros cannot pay, beside ``compute="dense"``, in interleaved rounds.

    python benchmarks/no_gain.py        five networks; ten minutes

Each is fitted inside Lightning with `RigLCallback`, once with each, in turn; the ratio of a round is the time
of a step with ``auto`` over that with ``dense``: 1.03 is 3 % slower. Median and quartiles of the rounds are
stored under ``results/``, and the layers that ``auto`` computed sparsely.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_rigl import RigLCallback
from machine import describe, store
from training_speed import CASES, Case, fit, rigl


def _mlp(*widths: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    )


def _case(net: Callable[[], nn.Module], shape: tuple[int, ...], steps: int) -> Case:
    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(shape), torch.randint(10, shape[:1])

    return replace(CASES["mlp"], net=net, batch=batch, steps=steps)


NETWORKS = {  # name -> the network and its batch, sparsity
    "MLP 3072-1024x3, batch 128, 50 %": (
        _case(lambda: _mlp(3072, 1024, 1024, 1024, 10), (128, 3072), 100),
        0.5,
    ),
    "MLP 3072-1024x3, batch 2, 90 %": (_case(lambda: _mlp(3072, 1024, 1024, 1024, 10), (2, 3072), 300), 0.9),
    "MLP 784-300-100, batch 128, 90 %": (_case(lambda: _mlp(784, 300, 100, 10), (128, 784), 600), 0.9),
    "MLP 64-32, batch 32, 98 %": (_case(lambda: _mlp(64, 32, 10), (32, 64), 1000), 0.98),
    "two convolutions, batch 32, 90 %": (_case(_cnn, (32, 3, 32, 32), 60), 0.9),
}


class Look(pl.Callback):
    """How the layers compute at the end."""

    cells: dict[str, str]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read what summary() shows."""
        [callback] = [c for c in trainer.callbacks if isinstance(c, RigLCallback)]  # type: ignore[attr-defined]
        assert callback.sparsifier is not None
        self.cells = callback.sparsifier.compute.cells


def chosen_by_auto(case: Case, sparsity: float) -> dict[str, str]:
    """Layer -> dense, or on what it computes."""
    run, look = rigl(case, sparsity, "auto"), Look()
    fit(replace(case, steps=2, warm=1), replace(run, callbacks=lambda: [*run.callbacks(), look]))
    return look.cells


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args(argv)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    for name, (case, sparsity) in NETWORKS.items():
        ratios = []
        for done in range(chosen.rounds):
            order = ("dense", "auto") if done % 2 else ("auto", "dense")
            times = {way: fit(case, rigl(case, sparsity, way)) for way in order}
            ratios.append(times["auto"] / times["dense"])
        low, median, high = statistics.quantiles(ratios, n=4)
        found[name] = row = {
            "auto / dense": round(median, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "auto computes": chosen_by_auto(case, sparsity),
        }
        print(name, row, flush=True)
    store("no_gain", {"machine": describe(), "rounds": chosen.rounds, **found})


if __name__ == "__main__":
    main()
