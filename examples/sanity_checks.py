"""Sanity checks of sparse masks: is it the connections that matter, or only how many each layer has?

Run it as ``python examples/sanity_checks.py``; it needs ``pip install 'lightning-rigl[examples,plot]'``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data import Batches, Digits
from digits import BATCH_SIZE, DROP_FRACTION, UPDATES, images, quiet
from lightning_rigl import (
    SNIP,
    Connections,
    GemMiner,
    RigLCallback,
    RigLInverted,
    SmartRatio,
    Sparsifier,
    UpdateSchedule,
)
from lightning_rigl.model.mask_controls import shuffled
from networks import MODELS, Classifier

EPOCHS = {"digits": 25, "mnist": 5}
CHECKS = ("ticket", "shuffled", "re-initialised", "inverted")
FREEZES = 20
SCORE_RATE = 0.1  # of Gem-Miner's scores: higher ones clip so many to 1 that there is little left to rank
NEW_WEIGHTS = 1000  # what is added to a seed for weights that no mask was made for

NOTES = """\
Test accuracy: mean and standard deviation over the seeds, after the same training for all from initial \
weights, with the mask fixed. ticket: the mask and the weights it was found with. shuffled: the same number \
of connections in each layer, elsewhere. re-initialised: the mask with other initial weights. inverted: \
Gem-Miner and SNIP that drop the highest scores, RigL that grows by the smallest gradient. smart-ratio: \
random masks. A mask passes a check if the ticket is clearly better than its control."""


class InvertedSNIP(SNIP):
    """A control: the connections that matter least to the loss stay."""

    def drop_score(self, layer: Connections) -> Tensor:
        """-|w dL/dw|."""
        return -super().drop_score(layer)


INVERTED = {"snip": InvertedSNIP(), "rigl": RigLInverted()}


@dataclass(frozen=True)
class Bench:
    """What all runs share: images, network, sparsity, and the length of each search and each training."""

    data: str
    directory: Path | None
    model: str
    sparsity: float
    epochs: int

    @property
    def digits(self) -> Digits:
        """The images."""
        return images(self.data, self.directory)

    def network(self, seed: int, lr: float = 0.1, weight_decay: float = 5e-4) -> Classifier:
        """A network with the initial weights of a seed: large enough to carry a signal untrained."""
        seed_everything(seed, verbose=False)
        build, widths = MODELS[self.model]
        net = build(self.digits.train_images[0].numel(), widths)
        for parameter in net.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
        return Classifier(net, lr, weight_decay)

    def fit(self, module: Classifier, rigl: RigLCallback, seed: int, epochs: int) -> Trainer:
        """Train the network."""
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",  # these networks are too small for anything else to pay
            callbacks=[rigl],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        digits = self.digits
        trainer.fit(module, Batches(digits.train_images, digits.train_labels, BATCH_SIZE, seed=seed))
        return trainer

    def fine_tune(self, masks: dict[str, Tensor], seed: int, weights: int) -> float:
        """Test accuracy in % of a mask that is trained from the initial weights of the seed ``weights``."""
        labels = self.digits.test_labels
        if not all(mask.any() for mask in masks.values()):  # then it gives one answer to all
            return 100 * float(labels.bincount().max() / len(labels))
        module = self.network(weights)
        trainer = self.fit(module, RigLCallback(method="static", init=masks), seed, self.epochs)
        test = Batches(self.digits.test_images, labels, 1000)
        return 100 * float(trainer.test(module, test, verbose=False)[0]["accuracy"])

    def find(self, method: str, seed: int, inverted: bool = False) -> dict[str, Tensor]:
        """The mask that a method finds for the initial weights of a seed."""
        steps = self.epochs * (len(self.digits.train_labels) // BATCH_SIZE)
        if method == "gemminer":
            module = self.network(seed, SCORE_RATE, weight_decay=0.0)
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.ndim > 1)  # nothing but scores is trained
            schedule = UpdateSchedule(max(1, steps // FREEZES), begin=0, end=1.0, policy="after_step")
            rigl = RigLCallback(self.sparsity, GemMiner(inverted=inverted), schedule=schedule, seed=seed)
        else:
            module = self.network(seed)
            schedule = UpdateSchedule(max(1, steps // UPDATES), drop_fraction=DROP_FRACTION)
            rigl = RigLCallback(
                self.sparsity, INVERTED[method] if inverted else method, schedule=schedule, seed=seed
            )
        self.fit(module, rigl, seed, epochs=1 if method == "snip" else self.epochs)
        return rigl.masks


@dataclass(frozen=True)
class Row:
    """Accuracy in % of one check of one method's mask; method and check name the row and the column."""

    method: str
    check: str
    seed: int
    accuracy: float


def check(job: tuple[str, int], bench: Bench) -> list[Row]:
    """All checks of one method's mask with one seed."""
    method, seed = job
    with quiet():
        return [Row(method, name, seed, accuracy) for name, accuracy in _checks(method, seed, bench)]


def _checks(method: str, seed: int, bench: Bench) -> Iterator[tuple[str, float]]:
    if method == "smart-ratio":
        random = Sparsifier(bench.network(seed), bench.sparsity, "static", SmartRatio(), seed=seed)
        yield "ticket", bench.fine_tune(random.masks, seed, weights=seed)
        return
    masks = bench.find(method, seed)
    yield "ticket", bench.fine_tune(masks, seed, weights=seed)
    yield "shuffled", bench.fine_tune(shuffled(masks, seed), seed, weights=seed)
    yield "re-initialised", bench.fine_tune(masks, seed, weights=seed + NEW_WEIGHTS)
    yield "inverted", bench.fine_tune(bench.find(method, seed, inverted=True), seed, weights=seed)


def table(title: str, rows: Sequence[Row]) -> Table:
    """Methods down, checks across."""
    drawn = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("mask", no_wrap=True)
    for name in CHECKS:
        drawn.add_column(name, justify="right", no_wrap=True)
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for name in CHECKS:
            values = [row.accuracy for row in rows if (row.method, row.check) == (method, name)]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        drawn.add_row(method, *cells)
    return drawn


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the user asks for."""
    methods = ("gemminer", "snip", "rigl", "smart-ratio")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=tuple(EPOCHS), default="digits", help="digits needs no download")
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz or with MNIST/raw")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="whose masks")
    parser.add_argument("--sparsity", type=float, default=0.98, help="fraction of zeros")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each check")
    parser.add_argument("--epochs", type=int, help="of each search and training; by default 25, 5 on MNIST")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    chosen = parser.parse_args(argv)
    for name in ("seeds", "epochs", "workers"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(chosen, name)}")
    if not 0 <= chosen.sparsity < 1:
        parser.error(f"--sparsity must lie in [0, 1), got {chosen.sparsity}")
    try:
        images(chosen.data, chosen.data_dir)
        if "smart-ratio" in chosen.methods:  # refused before hours of work, if it is impossible
            weights = Bench(chosen.data, chosen.data_dir, chosen.model, chosen.sparsity, 1).network(0)
            Sparsifier(weights, chosen.sparsity, "static", SmartRatio(), seed=0)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Find the masks, run their checks and print the table."""
    start, console = time.perf_counter(), Console()
    chosen = arguments(argv)
    epochs = chosen.epochs or EPOCHS[chosen.data]
    bench = Bench(chosen.data, chosen.data_dir, chosen.model, chosen.sparsity, epochs)
    jobs = [(method, seed) for method in chosen.methods for seed in range(chosen.seeds)]
    work = partial(check, bench=bench)
    if chosen.workers == 1:
        results = list(map(work, jobs))
    else:
        # the processes share the cores already, so that each computes with one thread
        with ProcessPoolExecutor(chosen.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            results = list(pool.map(work, jobs))
    rows = [row for result in results for row in result]
    title = f"{chosen.model} on {chosen.data}, {chosen.sparsity:.4g} sparse (seeds: {chosen.seeds})"
    console.print(table(title, rows))
    console.print(NOTES, highlight=False)
    console.print(f"{epochs} epochs each; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
