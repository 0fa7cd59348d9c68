"""Sparse networks beside the dense one on handwritten digits: accuracy, parameters and FLOPs of each.

Run it as ``python examples/digits.py``; it needs ``pip install 'lightning-rigl[examples,plot]'``.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from data import Batches, Digits, load
from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.plots import accuracy_against_flops, input_connections
from networks import MODELS, Classifier, count_parameters, thin_widths
from summary import summarise, table, write_csv

BATCH_SIZE = 64
EPOCHS = {"digits": 80, "mnist": 5}
METHODS = ("small-dense", "static", "set", "rigl")
# Both were chosen on held-out training images, with other seeds, for the best mean accuracy of SET and RigL
# over both models at 98 % sparsity; drop fractions of 0.1 to 0.3 differ there by less than a point.
DROP_FRACTION = 0.2
UPDATES = 36  # an update is due each 36th part of training, until three quarters of it are over

NOTES = """\
Accuracy: mean and standard deviation over the seeds. Active parameters: weights + biases and norms; the \
latter always stay dense. FLOPs: ratios to the dense net; training counts the forward and backward passes of \
all steps, with the dense gradient where RigL updates the topology. Time: of one training run; inactive \
weights are zeros in ordinary tensors, so that fewer FLOPs are not fewer seconds here. small-dense: a \
thinner dense net with about as many parameters as the sparse nets of its section."""


class FirstMasks(Callback):
    """Keeps the masks that training starts with."""

    def __init__(self, rigl: RigLCallback) -> None:
        self.rigl = rigl
        self.masks: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy them; they change in place."""
        self.masks = {name: mask.clone() for name, mask in self.rigl.masks.items()}


@dataclass(frozen=True)
class Run:
    """One network to train. The sparsity of a small-dense one is that of the sparse net it is as large as."""

    model: str
    system: str
    sparsity: float
    widths: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Result:
    """A row of the results, and the first layer's mask before and after training where there is one."""

    row: dict[str, Any]
    masks: tuple[Any, Any] | None  # numpy arrays: they travel between processes by value


def train(run: Run, digits: Digits, epochs: int) -> Result:
    """Train one network and test it at the end."""
    seed_everything(run.seed, verbose=False)
    module = Classifier(MODELS[run.model][0](digits.train_images[0].numel(), run.widths))
    batches = Batches(digits.train_images, digits.train_labels, BATCH_SIZE, seed=run.seed)
    flops = FLOPsCallback()
    callbacks: list[Callback] = [flops]
    if "dense" not in run.system:
        every = max(10, epochs * len(batches) // UPDATES)
        schedule = UpdateSchedule(every=every, drop_fraction=DROP_FRACTION)
        rigl = RigLCallback(run.sparsity, method=run.system, schedule=schedule, seed=run.seed)
        first = FirstMasks(rigl)
        callbacks += [rigl, first]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",  # these networks are too small for anything else to pay
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, batches)
    seconds = time.perf_counter() - start
    test = Batches(digits.test_images, digits.test_labels, 1000)
    accuracy = trainer.test(module, test, verbose=False)[0]["accuracy"]

    weights, always_dense = count_parameters(module)
    masks = None
    if "dense" not in run.system:
        weights = sum(int(mask.sum()) for mask in rigl.masks.values())
        name = next(iter(rigl.masks))
        masks = (first.masks[name].numpy(), rigl.masks[name].numpy())
    report = flops.report()
    row = {
        "model": run.model,
        "system": run.system,
        "sparsity": run.sparsity,
        "widths": "-".join(map(str, run.widths)),
        "seed": run.seed,
        "accuracy": 100 * accuracy,
        "weights": weights,
        "always_dense": always_dense,
        "forward": report.forward,
        "train": report.train,
        "seconds": seconds,
    }
    return Result(row, masks)


def plan(
    models: Sequence[str], methods: Sequence[str], sparsities: Sequence[float], seeds: int, pixels: int
) -> list[Run]:
    """All runs; the dense net is always among them, as the measure of the others."""
    runs = []
    for model in models:
        full = MODELS[model][1]
        systems = [("dense", 0.0, full)]
        for sparsity in sparsities:
            thin = thin_widths(model, pixels, sparsity)
            systems += [(m, sparsity, thin if m == "small-dense" else full) for m in methods]
        runs += [Run(model, *system, seed) for system in systems for seed in range(seeds)]
    return runs


def train_all(
    runs: Sequence[Run], work: Callable[[Run], Result], workers: int, console: Console
) -> list[Result]:
    """Train all networks, several side by side if there are several workers, under one progress bar."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        if workers == 1:
            return [work(run) for run in progress.track(runs)]
        # the processes share the cores already, so that each computes with one thread
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            return list(progress.track(pool.map(work, runs), total=len(runs)))


def train_on(run: Run, data: str, directory: Path | None, epochs: int) -> Result:
    """`train`, in a process that may not have the images yet."""
    with quiet():
        return train(run, images(data, directory), epochs)


@cache
def images(data: str, directory: Path | None) -> Digits:
    """The images, scaled; black stays 0, so that RigL can tell which pixels carry no signal."""
    return load(data, directory).standardised(centred=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware and workers, which would come once a run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


def write_pictures(
    folder: Path, summary: Sequence[dict[str, Any]], results: Sequence[Result], mean: Tensor
) -> None:
    """Accuracy against training FLOPs, and the input connections of RigL's sparsest MLP, if there is one."""
    accuracy_against_flops(summary).savefig(folder / "accuracy_against_flops.png", dpi=150)
    trained = [r for r in results if (r.row["model"], r.row["system"]) == ("mlp", "rigl")]
    if trained:
        sparsest = max(trained, key=lambda result: result.row["sparsity"])
        before, after = map(torch.from_numpy, sparsest.masks)
        input_connections(before, after, mean).savefig(folder / "input_connections.png", dpi=150)


def arguments(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", choices=("digits", "mnist"), default="digits", help="digits needs no download"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz or with MNIST/raw")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside the dense net")
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.9, 0.98), help="fractions of zeros")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each system")
    parser.add_argument("--epochs", type=int, help="of each run; by default 80, and 5 on MNIST")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="runs side by side")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/digits"), help="folder for CSV and PNG files"
    )
    chosen = parser.parse_args(argv)
    for name in ("seeds", "epochs", "workers"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(chosen, name)}")
    return parser, chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Train all networks, print a table per model, and write the numbers and pictures."""
    start = time.perf_counter()
    parser, chosen = arguments(argv)
    epochs = chosen.epochs or EPOCHS[chosen.data]
    try:
        digits = images(chosen.data, chosen.data_dir)
        pixels = digits.train_images[0].numel()
        sparsities = sorted(set(chosen.sparsities))
        runs = plan(chosen.models, chosen.methods, sparsities, chosen.seeds, pixels)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    chosen.output.mkdir(parents=True, exist_ok=True)

    console = Console()
    height, width = digits.train_images.shape[-2:]
    console.print(
        f"{digits.name}: {len(digits.train_labels):,} images of {height} x {width} pixels to train on, "
        f"{len(digits.test_labels):,} to test on; {len(runs)} runs of {epochs} epochs",
        highlight=False,
    )
    work = partial(train_on, data=chosen.data, directory=chosen.data_dir, epochs=epochs)
    results = train_all(runs, work, chosen.workers, console)
    rows = [result.row for result in results]
    summary = summarise(rows)
    for model in chosen.models:
        console.print(table(model, summary))
    console.print(NOTES, highlight=False)
    write_csv(chosen.output / "results.csv", rows)
    write_csv(chosen.output / "summary.csv", summary)
    write_pictures(chosen.output, summary, results, digits.train_images.mean((0, 1)))
    names = sorted(path.name for path in chosen.output.iterdir())
    console.print(f"Written to {chosen.output} after {time.perf_counter() - start:.0f} s: {', '.join(names)}")


if __name__ == "__main__":
    main()
