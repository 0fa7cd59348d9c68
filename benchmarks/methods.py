"""Methods side by side: the studies, and the folder DIR with their data.

    python benchmarks/methods.py all --data-dir DIR           MNIST, 20 epochs, every method at 90 and 98 %
    python benchmarks/methods.py long --data-dir DIR          MNIST, 100 epochs, four systems at 98 %
    python benchmarks/methods.py equal-flops --data-dir DIR   MNIST, the training FLOPs of 10 dense epochs
    python benchmarks/methods.py published --data-dir DIR     MNIST, 100 epochs, beside published values
    python benchmarks/methods.py text --data-dir DIR          a GRU on characters, 2,000 steps
    python benchmarks/methods.py cifar --data-dir DIR         a small WideResNet on CIFAR-10
    python benchmarks/methods.py cifar --protocol paper --data-dir DIR        WRN-22-2, 250 epochs, on a GPU

MNIST: mnist.npz, or torchvision's MNIST/raw; text: tinyshakespeare.txt; cifar: cifar10_jpeg.npz. Results and
a picture are stored after every run under ``results/``, and runs that stand there are not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

import cifar_study
import mnist_studies
import text_study
from digits import quiet  # of the examples; the studies have said where they are
from lightning_rigl import FLOPsCallback, GemMiner, Method, RigLCallback
from machine import RESULTS
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
from studies import DENSE, Case, Study, new_trainer, outcome, run

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


def train(case: Case, directory: Path, epochs: int = EPOCHS) -> dict[str, float]:
    """One run: test accuracy in per cent after the last epoch, and what it cost."""
    method, sparsity, seed = case
    digits = images(directory)
    seed_everything(seed, verbose=False)
    pixels = digits.train_images[0].numel()
    module = StepDecay(mlp(pixels, widths_of(method, sparsity, pixels)), LR, WEIGHT_DECAY)
    flops, start = FLOPsCallback(), time.perf_counter()
    stages: list[list[Callback]] = [[]]
    if "dense" not in method:
        of = GemMiner(penalty=1e-5) if method == "gemminer" else Method.of(method)
        stages = [[RigLCallback(sparsity, of, schedule=schedule_of(method), seed=seed)]]
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


STUDIES: dict[str, tuple[Callable[..., Study], int]] = {  # and how many seeds
    "all": (everything, 3),
    "long": (long, 3),
    "equal-flops": (mnist_studies.equal_flops, 3),
    "published": (mnist_studies.as_published, 1),
    "text": (text_study.study, 3),
    "cifar": (cifar_study.study, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the data, see above")
    parser.add_argument(
        "--seeds", type=int, help="of each method; by default 3, and 1 of published and cifar"
    )
    parser.add_argument("--protocol", choices=cifar_study.PROTOCOLS, help="of cifar; by default short")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(argv)
    if chosen.protocol and chosen.study != "cifar":
        parser.error(f"--protocol {chosen.protocol}: only cifar has protocols, not {chosen.study}")
    build, seeds = STUDIES[chosen.study]
    protocol = (chosen.protocol,) if chosen.protocol else ()
    words = [f"python benchmarks/methods.py {chosen.study}", *(f"--protocol {name}" for name in protocol)]
    try:
        study = build(chosen.seeds or seeds, *protocol)
        study.look(chosen.data_dir)
        run(study, chosen.data_dir, chosen.output, chosen.workers, " ".join([*words, "--data-dir DIR"]))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
