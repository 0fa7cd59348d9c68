"""What masking costs on an ordinary step, and what one topology update costs.

    python benchmarks/overhead.py          about six minutes on two cores; writes results/overhead.json

Masking: the same Lightning run with and without the callback, in interleaved rounds; the ratio is the time
spent in the callback's hooks over the time of a step of the run without it, and beside it the ratio of the
whole runs, which on a large model drowns in the noise of its convolutions. Update: all layers of ResNet-50 at
90 %, beside two full ``topk(k=n)`` passes over the same layers, interleaved.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from machine import describe, store

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from paper_networks import ResNet50

# updates are switched on, but none falls into the steps that are timed
ORDINARY = UpdateSchedule(every=1_000_000, end=2_000_000)


class Classifier(pl.LightningModule):
    """Cross entropy and SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, fused: the fastest on a CPU, so that the ratio is not flattered."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)


class StepTimes(pl.Callback):
    """Seconds from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int
    ) -> None:
        """Note the time."""
        self.starts.append(time.perf_counter())

    def median(self, skip: int) -> float:
        """The median step without the first ``skip``."""
        steps = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        return statistics.median(steps[skip:])


class Timed(RigLCallback):
    """The callback, with the time spent in its hooks of each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.before: list[float] = []
        self.after: list[float] = []

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        """Timed."""
        start = time.perf_counter()
        super().on_before_optimizer_step(*arguments)
        self.before.append(time.perf_counter() - start)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Timed."""
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.after.append(time.perf_counter() - start)

    def median(self, skip: int) -> float:
        """Seconds in both hooks of a step."""
        return statistics.median(a + b for a, b in zip(self.before[skip:], self.after[skip:], strict=True))


class Repeat:
    """One batch again and again, at no cost."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield self.batch


def fit(net: nn.Module, batch: tuple[Tensor, Tensor], steps: int, *callbacks: pl.Callback) -> None:
    """Train for some steps on one batch."""
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(net), Repeat(batch, steps))


def masking(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], steps: int, rounds: int
) -> dict[str, Any]:
    """Without and with the callback, in turns."""
    skip, plain, masked, hooks = max(steps // 4, 1), [], [], []
    for _ in range(rounds):
        times = StepTimes()
        fit(make(), batch, steps, times)
        plain.append(times.median(skip))
        times, callback = StepTimes(), Timed(sparsity=0.9, schedule=ORDINARY, seed=0)
        fit(make(), batch, steps, times, callback)
        masked.append(times.median(skip))
        hooks.append(callback.median(skip))
    return {
        "step_ms": round(1e3 * statistics.median(plain), 4),
        "hooks_ms": round(1e3 * statistics.median(hooks), 5),
        "hooks_over_step": round(statistics.median(h / p for h, p in zip(hooks, plain, strict=True)), 6),
        "run_with_over_without": round(
            statistics.median(m / p for m, p in zip(masked, plain, strict=True)), 4
        ),
        "steps": steps,
        "rounds": rounds,
    }


def update(rounds: int) -> dict[str, Any]:
    """One update of all layers beside two full topk passes, in turns."""
    model = ResNet50()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    sparsifier = Sparsifier(model, 0.9, schedule=UpdateSchedule(every=1, begin=0, end=10_000), seed=0)
    sparsifier.start()

    def gradients() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)

    gradients()
    sparsifier.before_step(optimizer, -1)  # an ordinary step
    optimizer.step()  # so that there is momentum to reset
    ours, sorts = [], []
    for step in range(rounds + 1):
        gradients()
        scores = [(p.detach().abs().view(-1), p.grad.abs().view(-1)) for p in sparsifier.parameters.values()]
        start = time.perf_counter()
        for drop, grow in scores:
            drop.topk(drop.numel())
            grow.topk(grow.numel())
        middle = time.perf_counter()
        sparsifier.before_step(optimizer, step)
        sorts.append(middle - start)
        ours.append(time.perf_counter() - middle)
    ours, sorts = ours[1:], sorts[1:]  # the first warms up
    size = sum(mask.numel() for mask in sparsifier.masks.values())
    return {
        "weights": size,
        "update_ms": round(1e3 * statistics.median(ours), 1),
        "ns_per_weight": round(1e9 * statistics.median(ours) / size, 2),
        "two_topk_ms": round(1e3 * statistics.median(sorts), 1),
        "topk_over_update": round(statistics.median(s / o for s, o in zip(sorts, ours, strict=True)), 1),
        "rounds": rounds,
    }


def lenet() -> nn.Module:
    """LeNet-300-100."""
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="steps per run of ResNet-50")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    images = torch.randn(16, 3, 224, 224), torch.randint(0, 1000, (16,))
    digits = torch.randn(128, 784), torch.randint(0, 10, (128,))
    result = {
        "command": "python benchmarks/overhead.py",
        "machine": describe(),
        "masking_lenet_300_100_batch_128": masking(lenet, digits, steps=400, rounds=15),
        "masking_resnet50_batch_16_224px": masking(ResNet50, images, steps=arguments.steps, rounds=5),
        "update_resnet50": update(rounds=7),
    }
    for name, value in result.items():
        print(name, value)
    print("stored in", store("overhead", result).name)


if __name__ == "__main__":
    main()
