"""MNIST, LeNet-300-100: methods at equal training FLOPs, and by a published protocol."""

from __future__ import annotations

import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from lightning_rigl import (
    Distribution,
    FLOPsCallback,
    RigLCallback,
    Uniform,
    UpdateSchedule,
    steps_for_budget,
)
from studies import DENSE, Case, Column, Study, new_trainer, outcome

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from data import Batches, Digits, load
from digits import quiet
from networks import Classifier, mlp, thin_widths

BATCH_SIZE, LR, WEIGHT_DECAY = 100, 0.1, 5e-4
PIXELS, PER_EPOCH = 28 * 28, 600  # of MNIST
UPDATES = UpdateSchedule(every=100, drop_fraction=0.3, end=0.75)
PRUNING = UpdateSchedule(every=100, begin=10 / 32, end=25 / 32, policy="after_step")
OF_THE_PAPER = ("rigl", "set", "snfs", "snfsoriginal", "riglsg", "riglsm", "riglinverted", "cigl")

DENSE_EPOCHS, MOST_EPOCHS = 10, 200  # what pays for the sparse trainings, and the longest of these

EACH_EPOCH = UpdateSchedule(every=PER_EPOCH, drop_fraction=0.5, end=1.0)
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
VALUES = {"snfsoriginal": (98.67, 98.53, 98.2, 97.53), "set": (98.39, 98.14, 97.74, 95.8)}
PUBLISHED = {(m, s): value for m, row in VALUES.items() for s, value in zip(SPARSITIES, row, strict=True)}
SOURCE = (
    "the results published with the code of Dettmers and Zettlemoyer, arXiv:1907.04840 (results/MNIST_sparse_"
    "summary.csv); RigL, static and snfs (the RigL paper's form) are not among them. As there: 100 epochs, "
    "batches of 100, Nesterov momentum, the learning rate divided by 10 each 25,000 steps, the same sparsity "
    "in each layer, an update after each epoch but the last that replaces 0.5 of the connections at first, "
    "falling along a cosine. Different here: an update takes the place of a step; all 60,000 images train "
    "(their code holds out a tenth unless told otherwise); counts are exact where theirs are drawn; early "
    "versions of their code reset the momentum at an update; the cosine ends at 0, not 0.005. How their set "
    "was initialised and shared between layers is not said."
)


class ShareDecay(Classifier):
    """The learning rate is divided by 10 at two shares of the optimizer steps, however many there are."""

    def __init__(
        self, net: nn.Module, shares: tuple[float, float] = (0.5, 0.75), nesterov: bool = False
    ) -> None:
        super().__init__(net, LR, WEIGHT_DECAY)
        self.shares, self.nesterov = shares, nesterov

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum 0.9, of Nesterov's form or not."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=self.nesterov
        )
        steps = [round(share * self.trainer.estimated_stepping_batches) for share in self.shares]
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


@cache
def images(directory: Path) -> Digits:
    """The images, read once in each process."""
    return load("mnist", directory).standardised()


def schedule_of(method: str) -> UpdateSchedule | None:
    """The schedule of a method in these studies; None is its own default."""
    if method in OF_THE_PAPER:
        return UPDATES
    return PRUNING if method.startswith("gradual") else None


def batches(digits: Digits, seed: int) -> Batches:
    """The training images in batches."""
    return Batches(digits.train_images, digits.train_labels, BATCH_SIZE, seed=seed)


def accuracy(trainer: Trainer, module: Classifier, digits: Digits) -> float:
    """Test accuracy in per cent."""
    test = Batches(digits.test_images, digits.test_labels, 1000)
    return round(100 * trainer.test(module, test, verbose=False)[0]["accuracy"], 2)


def widths_of(method: str, sparsity: float, pixels: int = PIXELS) -> tuple[int, ...]:
    """Of the two hidden layers: those of LeNet, or fewer for a dense net as large as the sparse one."""
    return thin_widths("mlp", pixels, sparsity) if method == "small-dense" else (300, 100)


def dense_flops(pixels: int, samples: int) -> int:
    """FLOPs of training the dense net on a number of samples."""
    return 3 * 2 * (pixels * 300 + 300 * 100 + 100 * 10) * samples


def common() -> dict[str, Any]:
    """What all studies here share."""
    return {
        "model": "LeNet-300-100, ReLU, PyTorch's default initialisation; biases dense",
        "data": "60,000 images, standardised by mean and deviation of all training pixels, no augmentation",
    }


def paid_for(method: str, sparsity: float, dense_steps: int, pixels: int = PIXELS) -> int:
    """The optimizer steps that cost what ``dense_steps`` of the dense net do, by the real schedule."""
    dense = "dense" in method
    return steps_for_budget(
        mlp(pixels, widths_of(method, sparsity, pixels)),
        (BATCH_SIZE, pixels),
        budget=dense_flops(pixels, BATCH_SIZE) * dense_steps,
        sparsity=0.0 if dense else sparsity,
        method="static" if dense else method,
        schedule=schedule_of(method),
    )


def train_equally(
    case: Case, directory: Path, dense_epochs: int = DENSE_EPOCHS, most: int = MOST_EPOCHS
) -> dict[str, float]:
    """One run, as long as the FLOPs of a dense training pay for, and no longer than ``most`` epochs."""
    method, sparsity, seed = case
    digits = images(directory)
    seed_everything(seed, verbose=False)
    pixels, data = digits.train_images[0].numel(), batches(digits, seed)
    steps = min(paid_for(method, sparsity, dense_epochs * len(data), pixels), most * len(data))
    module = ShareDecay(mlp(pixels, widths_of(method, sparsity, pixels)))
    flops, start = FLOPsCallback(), time.perf_counter()
    callbacks: list[Callback] = [flops]
    if "dense" not in method:
        callbacks.append(RigLCallback(sparsity, method, schedule=schedule_of(method), seed=seed))
    with quiet():
        trainer = new_trainer(callbacks, steps=steps)
        trainer.fit(module, data)
        score = accuracy(trainer, module, digits)
    budget = dense_flops(pixels, BATCH_SIZE) * dense_epochs * len(data)
    return {**outcome(score, module, flops, budget, start), "epochs": steps / len(data)}


def lengths(cases: list[Case]) -> str:
    """How many epochs each case gets, and where the longest allowed is less than the budget pays for."""
    words = []
    for method, sparsity in dict.fromkeys(case[:2] for case in cases):
        epochs = paid_for(method, sparsity, DENSE_EPOCHS * PER_EPOCH) / PER_EPOCH
        cut = f"{MOST_EPOCHS} (the cap binds: {epochs:.1f} are paid for)"
        name = f"{method} {sparsity:g}" if sparsity else method
        words.append(f"{name}: " + (cut if epochs > MOST_EPOCHS else f"{epochs:.1f}"))
    return "; ".join(words)


def equal_flops(seeds: int) -> Study:
    """What each method makes of the FLOPs of 10 dense epochs."""
    sparse = ("small-dense", "static", "set", "rigl", "gradual")
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [(method, s, seed) for seed in range(seeds) for method in sparse for s in (0.9, 0.98)]
    return Study(
        "methods_equal_flops",
        f"MNIST, LeNet-300-100, the training FLOPs of {DENSE_EPOCHS} dense epochs",
        tuple(cases),
        train_equally,
        {
            **common(),
            "budget": f"{DENSE_EPOCHS} dense epochs; at most {MOST_EPOCHS} epochs",
            "epochs": lengths(cases),
            "batch_size": BATCH_SIZE,
            "optimizer": f"SGD, lr {LR}, momentum 0.9, weight decay {WEIGHT_DECAY}; the same for all",
            "lr_decay": "x 0.1 after 1/2 and 3/4 of the steps",
            "distribution": "ERK",
            "schedule": f"{UPDATES}; gradual: {PRUNING}; fractions are of the run's own length",
            "small-dense": "a dense net with as many weights as the sparse one",
        },
        "Test accuracy in per cent",
        {},
        look=images,
        columns=(Column("epochs", "epochs", 1), Column("train_ratio", "training FLOPs", 4)),
        shown=(96, 99),
    )


def train_as_published(case: Case, directory: Path, epochs: int = 100) -> dict[str, float]:
    """One run by the protocol of the published results; ``-erk`` behind a method shares by ERK."""
    (method, sparsity, seed), digits = case, images(directory)
    seed_everything(seed, verbose=False)
    pixels, data = digits.train_images[0].numel(), batches(digits, seed)
    module = ShareDecay(mlp(pixels), (25 / 60, 50 / 60), nesterov=True)
    flops, start = FLOPsCallback(), time.perf_counter()
    callbacks: list[Callback] = [flops]
    if method != "dense":
        name, _, erk = method.partition("-")
        shared: Distribution | str = "erk" if erk else Uniform(dense_first=False)
        callbacks.append(RigLCallback(sparsity, name, shared, EACH_EPOCH, seed=seed))
    with quiet():
        trainer = new_trainer(callbacks, epochs)
        trainer.fit(module, data)
        score = accuracy(trainer, module, digits)
    return outcome(score, module, flops, dense_flops(pixels, epochs * len(data) * BATCH_SIZE), start)


def as_published(seeds: int, epochs: int = 100) -> Study:
    """The published row of SNFS and SET, and RigL and Static beside it."""
    shared = dict.fromkeys(("static", "set", "snfs", "snfsoriginal", "rigl"), SPARSITIES)
    shared |= {f"{m}-erk": SPARSITIES[2:] for m in ("static", "set", "rigl")}  # where the shares decide
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [(m, s, seed) for seed in range(seeds) for m, own in shared.items() for s in own]
    return Study(
        "methods_published",
        "MNIST, LeNet-300-100, a published protocol of 100 epochs",
        tuple(cases),
        partial(train_as_published, epochs=epochs),
        {
            **common(),
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "optimizer": f"SGD, lr {LR}, Nesterov momentum 0.9, weight decay {WEIGHT_DECAY}",
            "lr_decay": "x 0.1 after 25,000 and 50,000 of 60,000 steps",
            "distribution": "the same sparsity in each layer; -erk: ERK",
            "schedule": f"{EACH_EPOCH}",
        },
        "Test accuracy in per cent",
        {("dense", DENSE): 98.69, **PUBLISHED},
        SOURCE,
        look=images,
        shown=(95, 99),
    )
