"""Every method on MNIST, LeNet-300-100, side by side; see ``--help`` for the studies.

    python benchmarks/methods.py all --data-dir DIR       20 epochs, every method at 90 and 98 %, 3 seeds

DIR holds mnist.npz, or torchvision's MNIST/raw. Results are stored after every run under ``results/``, and
runs that stand there already are not repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_rigl import FLOPsCallback, GemMiner, Method, RigLCallback, UpdateSchedule
from machine import RESULTS
from studies import Case, Study, run

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from data import Batches, Digits, load
from digits import quiet
from networks import Classifier, mlp, thin_widths

BATCH_SIZE, LR, WEIGHT_DECAY, EPOCHS = 100, 0.1, 5e-4, 20
UPDATES = UpdateSchedule(every=100, drop_fraction=0.3, end=0.75)
PRUNING = UpdateSchedule(every=100, begin=10 / 32, end=25 / 32, policy="after_step")
OF_THE_PAPER = ("rigl", "set", "snfs", "snfsoriginal", "riglsg", "riglsm", "riglinverted", "cigl")
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
        "model": "LeNet-300-100, ReLU, PyTorch's default initialisation; biases dense",
        "data": "60,000 images, standardised by mean and deviation of all training pixels, no augmentation",
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


@cache
def images(directory: Path) -> Digits:
    """The images, read once in each process."""
    return load("mnist", directory).standardised()


def schedule_of(method: str) -> UpdateSchedule | None:
    """The schedule of a method in these studies; None is its own default."""
    if method in OF_THE_PAPER:
        return UPDATES
    return PRUNING if method.startswith("gradual") else None


def train(case: Case, directory: Path, epochs: int = EPOCHS) -> dict[str, float]:
    """One run: test accuracy in per cent after the last epoch, and what it cost."""
    method, sparsity, seed = case
    digits = images(directory)
    seed_everything(seed, verbose=False)
    pixels = digits.train_images[0].numel()
    widths = thin_widths("mlp", pixels, sparsity) if method == "small-dense" else (300, 100)
    module = StepDecay(mlp(pixels, widths), LR, WEIGHT_DECAY)
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
            trainer = fit(module, digits, [flops, *callbacks], epochs, seed)
            module.weight_decay = WEIGHT_DECAY
        test = Batches(digits.test_images, digits.test_labels, 1000)
        accuracy = 100 * trainer.test(module, test, verbose=False)[0]["accuracy"]
    report, samples = flops.report(), epochs * (len(digits.train_labels) // BATCH_SIZE * BATCH_SIZE)
    dense = 3 * 2 * (pixels * 300 + 300 * 100 + 100 * 10) * samples
    return {
        "score": round(accuracy, 2),
        "active": sum(int(p.count_nonzero()) for p in module.parameters() if p.dim() > 1),
        "forward_ratio": report.forward_ratio,
        "train_flops": report.train,
        "train_ratio": report.train / dense,
        "seconds": round(time.perf_counter() - start, 1),
    }


def fit(module: Classifier, digits: Digits, callbacks: list[Callback], epochs: int, seed: int) -> Trainer:
    """Train for a number of epochs."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(digits.train_images, digits.train_labels, BATCH_SIZE, seed=seed))
    return trainer


def everything(seeds: int) -> Study:
    """Every method at 90 and 98 %, 20 epochs."""
    cases = [("dense", s, seed) for s in (0.9, 0.98) for seed in range(seeds)]
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
    )


STUDIES = {"all": everything}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist.npz or MNIST/raw")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(argv)
    try:
        images(chosen.data_dir)  # a wrong folder shows here, not in every worker
        study = STUDIES[chosen.study](chosen.seeds)
        command = f"python benchmarks/methods.py {chosen.study} --data-dir DIR"
        run(study, chosen.data_dir, chosen.output, chosen.workers, command)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
