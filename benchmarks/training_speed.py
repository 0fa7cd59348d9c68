"""Steps per second of sparse training inside Lightning, beside dense training, in interleaved rounds.

    python benchmarks/training_speed.py mlp          3072-1024-1024-1024-10, batch 128, SGD: three minutes
    python benchmarks/training_speed.py vit          ViT-B, batch 4, AdamW: three minutes a round

Every round fits the same module anew: dense (no callback), then RigL at each sparsity: dense-masked, on each
backend, and natively with the optimizer of active connections ("step"); of the MLP an update every 100 steps
lies inside the timed steps. The ratio of a round is the dense time of a step over the sparse one; the median
over rounds is stored under ``results/``. The baseline is float32 and eager with the fused optimizer, the
fastest one on a CPU, and by default MKL's best kernels, whoever made the processor; ``--as-shipped`` takes
torch as it comes. Dense training is also given with the network compiled by torch.compile, where there is a
compiler, and as Lightning's bf16-mixed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dense_baseline import fair, start_fair
from lightning_rigl import ActiveAdamW, ActiveSGD, RigLCallback, UpdateSchedule
from machine import describe, store
from vision_transformer import ViT

EVERY = 100  # steps between updates


class Classifier(pl.LightningModule):
    """Cross entropy; nothing in it knows of sparsity."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.make = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What the case says."""
        return self.make(self.parameters())


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    net: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]
    active: Callable[..., torch.optim.Optimizer]  # the same for active connections only
    sparsities: tuple[float, ...]
    steps: int
    warm: int
    every: int = EVERY


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
        *(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True)


def _active_sgd(parameters: Any) -> torch.optim.Optimizer:
    return ActiveSGD(parameters, 0.01, momentum=0.9, active_gradients=True)


def _active_adamw(parameters: Any) -> torch.optim.Optimizer:
    return ActiveAdamW(parameters, 1e-4, active_gradients=True)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-4, fused=True)


CASES = {
    "mlp": Case(
        _mlp,
        lambda: (torch.randn(128, 3072), torch.randint(10, (128,))),
        _sgd,
        _active_sgd,
        (0.9, 0.95, 0.98),
        steps=200,
        warm=10,
    ),
    "vit": Case(
        lambda: ViT(classes=1000),
        lambda: (torch.randn(4, 3, 224, 224), torch.randint(1000, (4,))),
        _adamw,
        _active_adamw,
        (0.9, 0.95),
        steps=8,
        warm=2,
    ),
}


class Clock(pl.Callback):
    """Seconds a step, from the end of the warm-up to the end."""

    def __init__(self, warm: int) -> None:
        self.warm, self.start, self.end, self.steps = warm, 0.0, 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Note the time."""
        if trainer.global_step == self.warm:
            self.start = time.perf_counter()
        self.end, self.steps = time.perf_counter(), trainer.global_step - self.warm

    @property
    def seconds(self) -> float:
        """Of one step."""
        return (self.end - self.start) / self.steps


@dataclass(frozen=True)
class Run:
    """What distinguishes the fits of a case."""

    callbacks: Callable[[], list[pl.Callback]] = list
    active: bool = False  # the optimizer of active connections
    compiled: bool = False
    precision: str = "32-true"


def fit(case: Case, run: Run) -> float:
    """Seconds a step of a fit."""
    torch.manual_seed(0)
    net: Any = case.net()
    module = Classifier(
        torch.compile(net) if run.compiled else net, case.active if run.active else case.optimizer
    )
    clock = Clock(case.warm)
    batches = [case.batch() for _ in range(4)]
    trainer = pl.Trainer(
        max_steps=case.steps + case.warm,
        accelerator="cpu",
        callbacks=[*run.callbacks(), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=run.precision,  # type: ignore[arg-type]
    )
    batches *= 1 + (case.steps + case.warm) // len(batches)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds


def rigl(case: Case, sparsity: float, way: str) -> Run:
    """A sparse run: the callback's ``compute``, or "step"."""
    schedule = UpdateSchedule(every=case.every, begin=case.every, end=1.0)
    compute: Any = "native" if way == "step" else way
    return Run(
        lambda: [RigLCallback(sparsity, schedule=schedule, seed=0, compute=compute)], active=way == "step"
    )


def runs_of(case: Case, ways: Sequence[str]) -> dict[str, Run]:
    """Dense runs and sparse ones, by name."""
    runs = {"dense": Run(), "dense bf16": Run(precision="bf16-mixed"), "dense compiled": Run(compiled=True)}
    try:
        fit(replace(case, steps=1, warm=1), runs["dense compiled"])
    except Exception as error:
        print(f"dense compiled: left out, {type(error).__name__}")
        del runs["dense compiled"]
    return runs | {f"{way} {s:g}": rigl(case, s, way) for s in case.sparsities for way in ways}


def measure(case: Case, runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Milliseconds a step of each run, and the median over rounds of dense time / its time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        for name, run in runs.items():
            times[name].append(1e3 * fit(case, run))
        print(f"round {done + 1}:", {name: round(t[-1], 2) for name, t in times.items()}, flush=True)
    ratios = {
        name: statistics.median(d / t for d, t in zip(times["dense"], own, strict=True))
        for name, own in times.items()
    }
    return {
        "milliseconds": {name: round(statistics.median(own), 3) for name, own in times.items()},
        "ratio": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one case, print and store it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ways", nargs="+", default=["dense", "torch", "native", "step"], help="of computing"
    )
    parser.add_argument("--as-shipped", action="store_true", help="the dense baseline is torch as it comes")
    chosen = parser.parse_args(argv)
    if not chosen.as_shipped:
        start_fair()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    case = CASES[chosen.case]
    found = measure(case, runs_of(case, chosen.ways), chosen.rounds)
    for name, ratio in found["ratio"].items():
        print(f"{name:16}{found['milliseconds'][name]:10.2f} ms a step  {ratio:6.2f}x of dense")
    baseline = "float32, eager, fused optimizer, " + ("MKL's best kernels" if fair() else "torch as shipped")
    name = f"training_speed_{chosen.case}" + ("_as_shipped" if chosen.as_shipped else "")
    store(name, {"machine": describe(), "baseline": baseline, "rounds": chosen.rounds, **found})


if __name__ == "__main__":
    main()
