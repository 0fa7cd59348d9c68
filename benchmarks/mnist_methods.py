"""MNIST, LeNet-300-100: every method by the same protocol, and what changes the order of some."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn

import mnist_studies
from data import Digits, load  # of the examples; the studies have said where they are
from digits import quiet
from lightning_rigl import FLOPsCallback, GemMiner, Method, RigLCallback, UpdateSchedule
from mnist_studies import (
    BATCH_SIZE,
    LR,
    OF_THE_PAPER,
    PRUNING,
    UPDATES,
    WEIGHT_DECAY,
    accuracy,
    batches,
    common,
    dense_flops,
    images,
    schedule_of,
    widths_of,
)
from networks import Classifier, mlp
from studies import DENSE, Case, Study, new_trainer, outcome

EPOCHS, LONG = 20, 100
OF_THEIR_OWN = ("static", "dsr", "deepr", "dnw", "snip", "snipglobal", "grasp", "synflow", "edgepopup")
SPARSE = (*OF_THE_PAPER, "gradual", "gradualglobal", *OF_THEIR_OWN, "gemminer")


class StepDecay(Classifier):
    """The demo's classifier; the learning rate is divided by 10 at 1/2 and 3/4 of training."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """For SynFlow, which looks at the module from outside."""
        return self.net(images)

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum 0.9."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
        )
        epochs = self.trainer.max_epochs or 1
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": decay}


def settings(epochs: int) -> dict[str, Any]:
    """What two sets of runs must share to be compared."""
    return {
        **common(),
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "optimizer": f"SGD, lr {LR}, momentum 0.9, weight decay {WEIGHT_DECAY}; the same for all",
        "lr_decay": f"x 0.1 after {epochs // 2} and {epochs * 3 // 4} epochs",
        "distribution": "ERK",
        "schedule": f"{UPDATES}; gradual: {PRUNING}; {', '.join(OF_THEIR_OWN)}: their own",
        "small-dense": "a dense net with as many weights as the sparse one",
        "gemminer": f"scores for {epochs} epochs (no weight decay), then the ticket for {epochs}",
        "edgepopup": "scores only, no weight decay",
    }


@dataclass(frozen=True)
class Change:
    """What one run has otherwise.

    Args:
        schedule: of the updates.
        black_is_zero: the images are scaled and not centred.
        he: initial weights are He's normal ones, not PyTorch's default.
    """

    schedule: UpdateSchedule | None = None
    black_is_zero: bool = False
    he: bool = False


CHANGES = {
    "every 300": Change(replace(UPDATES, every=300)),
    "every 600": Change(replace(UPDATES, every=600)),
    "each epoch, half, to the end": Change(mnist_studies.EACH_EPOCH),
    "black is 0": Change(black_is_zero=True),
    "he": Change(he=True),
}


@cache
def uncentred(directory: Path) -> Digits:
    """The images with black at 0, read once in each process."""
    return load("mnist", directory).standardised(centred=False)


def train(case: Case, directory: Path, epochs: int = EPOCHS, change: Change = Change()) -> dict[str, float]:
    """One run: test accuracy in per cent after the last epoch, and what it cost."""
    method, sparsity, seed = case
    digits = uncentred(directory) if change.black_is_zero else images(directory)
    seed_everything(seed, verbose=False)
    pixels = digits.train_images[0].numel()
    module = StepDecay(mlp(pixels, widths_of(method, sparsity, pixels)), LR, WEIGHT_DECAY)
    for layer in module.modules():
        if change.he and isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    flops, start = FLOPsCallback(), time.perf_counter()
    stages: list[list[Callback]] = [[]]
    if "dense" not in method:
        of = GemMiner(penalty=1e-5) if method == "gemminer" else Method.of(method)
        stages = [[RigLCallback(sparsity, of, schedule=change.schedule or schedule_of(method), seed=seed)]]
        module.weight_decay = 0.0 if of.latent and method != "dnw" else WEIGHT_DECAY
    if method == "gemminer":
        stages.append([RigLCallback(method="static", init="nonzero", seed=seed)])
    with quiet():
        for callbacks in stages:
            trainer = new_trainer([flops, *callbacks], epochs)
            trainer.fit(module, batches(digits, seed))
            module.weight_decay = WEIGHT_DECAY
        score = accuracy(trainer, module, digits)
    samples = epochs * len(batches(digits, seed)) * BATCH_SIZE
    return outcome(score, module, flops, dense_flops(pixels, samples), start)


def everything(seeds: int) -> Study:
    """Every method at 90 and 98 %, 20 epochs."""
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [
        (method, s, seed) for seed in range(seeds) for method in ("small-dense", *SPARSE) for s in (0.9, 0.98)
    ]
    return Study(
        "methods_all",
        "Every method on MNIST, LeNet-300-100, 20 epochs",
        tuple(cases),
        train,
        settings(EPOCHS),
        "Test accuracy in per cent",
        {},
        look=images,
        shown=(96, 99),
    )


def train_changed(case: Case, directory: Path, epochs: int = EPOCHS) -> dict[str, float]:
    """One run of a method, and after a comma the change."""
    name, sparsity, seed = case
    method, _, change = name.partition(", ")
    return train((method, sparsity, seed), directory, epochs, CHANGES[change])


def orders(seeds: int) -> Study:
    """RigL, SET and Gem-Miner at 98 %, each with one thing changed."""
    names = [f"{method}, {change}" for change in CHANGES if change != "he" for method in ("rigl", "set")]
    cases: list[Case] = [(name, 0.98, seed) for seed in range(seeds) for name in [*names, "gemminer, he"]]
    chosen = {
        name: value for name, value in settings(EPOCHS).items() if name not in ("schedule", "small-dense")
    }
    return Study(
        "methods_orders",
        f"MNIST, LeNet-300-100 at 98 %, {EPOCHS} epochs, one thing changed",
        tuple(cases),
        train_changed,
        {**chosen, "schedule": f"{UPDATES}", **{name: str(change) for name, change in CHANGES.items()}},
        "Test accuracy in per cent",
        {},
        look=images,
        shown=(96, 99),
    )


def long(seeds: int) -> Study:
    """Dense, Static, SET and RigL at 98 %, 100 epochs."""
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [(method, 0.98, seed) for seed in range(seeds) for method in ("static", "set", "rigl")]
    shared = ("model", "data", "epochs", "batch_size", "optimizer", "lr_decay", "distribution")
    chosen = {name: value for name, value in settings(LONG).items() if name in shared}
    return Study(
        "methods_long",
        f"MNIST, LeNet-300-100 at 98 %, {LONG} epochs",
        tuple(cases),
        partial(train, epochs=LONG),
        {**chosen, "schedule": str(UPDATES)},
        "Test accuracy in per cent",
        {},
        look=images,
        shown=(96, 99),
    )
