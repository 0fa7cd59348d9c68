"""MNIST, LeNet-300-100 at 98 % sparsity: dense, Static, SET and RigL over 100 epochs and several seeds.

    python benchmarks/mnist.py --data-dir DIR          DIR holds mnist.npz, or torchvision's MNIST/raw

Each run is a process with one thread. ``results/mnist.json`` and ``results/mnist.md`` are written after every
run that ends, and runs that stand there already are not repeated. The accuracy is that of the last epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from machine import RESULTS, describe

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from data import Batches, Digits, load
from digits import quiet
from networks import Classifier, mlp

SYSTEMS = ("dense", "static", "set", "rigl")
SPARSITY = 0.98
BATCH_SIZE = 100
LR, WEIGHT_DECAY = 0.1, 5e-4
SCHEDULE = UpdateSchedule(every=100, drop_fraction=0.3, end=0.75)


class StepDecay(Classifier):
    """The demo's classifier; the learning rate is divided by 10 at 1/2 and 3/4 of training."""

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum 0.9; the same for all systems."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
        )
        epochs = self.trainer.max_epochs
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": decay}


def settings(epochs: int) -> dict[str, Any]:
    """What two sets of runs must share to be compared."""
    return {
        "model": "LeNet-300-100, ReLU, PyTorch's default initialisation",
        "data": "60,000 images, standardised by mean and deviation of all training pixels, no augmentation",
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "optimizer": f"SGD, lr {LR}, momentum 0.9, weight decay {WEIGHT_DECAY}",
        "lr_decay": f"x 0.1 after {epochs // 2} and {epochs * 3 // 4} epochs",
        "sparsity": f"{SPARSITY}, ERK, biases dense",
        "schedule": str(SCHEDULE),
        "accuracy": "percent of the 10,000 test images, after the last epoch",
    }


@cache
def images(directory: Path) -> Digits:
    """The images, read once in each process."""
    return load("mnist", directory).standardised()


def train(system: str, seed: int, epochs: int, directory: Path) -> dict[str, Any]:
    """One run, as a row of the results."""
    digits = images(directory)
    seed_everything(seed, verbose=False)
    module = StepDecay(mlp(28 * 28), LR, WEIGHT_DECAY)
    flops = FLOPsCallback()
    callbacks: list[Callback] = [flops]
    if system != "dense":
        callbacks.append(RigLCallback(SPARSITY, method=system, schedule=SCHEDULE, seed=seed))
    with quiet():
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(module, Batches(digits.train_images, digits.train_labels, BATCH_SIZE, seed=seed))
        seconds = time.perf_counter() - start
        test = Batches(digits.test_images, digits.test_labels, 1000)
        accuracy = 100 * trainer.test(module, test, verbose=False)[0]["accuracy"]
    report = flops.report()
    return {
        "system": system,
        "seed": seed,
        "accuracy": round(accuracy, 2),
        "active": sum(layer.active for layer in report.layers),
        "forward_ratio": report.forward_ratio,
        "train_flops": report.train,
        "train_ratio": report.train_ratio,
        "seconds": round(seconds, 1),
    }


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    machine = content["machine"]
    lines = [
        "# MNIST, LeNet-300-100 at 98 % sparsity",
        "",
        "| system | test accuracy % | of each seed | active weights "
        "| inference FLOPs | training FLOPs | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in SYSTEMS:
        runs = [run for run in content["runs"] if run["system"] == system]
        if not runs:
            continue
        accuracies = [run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        seconds = statistics.mean(run["seconds"] for run in runs)
        cells = (
            system,
            f"{statistics.mean(accuracies):.2f}{spread}",
            ", ".join(f"{accuracy:.2f}" for accuracy in accuracies),
            f"{runs[0]['active']:,}",
            f"{runs[0]['forward_ratio']:.4f}",
            f"{runs[0]['train_ratio']:.4f}",
            f"{seconds:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "± is the standard deviation over the seeds; FLOPs are ratios to the dense net; seconds are those of "
        "one run with one thread.",
        "",
        f"Command: `{content['command']}`. Machine: {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, lightning {machine['lightning']}.",
        "",
        *(f"- {name}: {value}" for name, value in content["settings"].items()),
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Replace both files, in a way that an interruption leaves the old ones."""
    content["runs"].sort(key=lambda run: (SYSTEMS.index(run["system"]), run["seed"]))
    for name, text in (("mnist.json", json.dumps(content, indent=1) + "\n"), ("mnist.md", markdown(content))):
        draft = folder / f"{name}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / name)


def earlier_runs(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that an interrupted benchmark has left.

    Raises:
        ValueError: they were made with other settings or on another machine.
    """
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for part in ("settings", "machine"):
        if earlier[part] != content[part]:
            raise ValueError(
                f"{path} holds runs with other {part}, {earlier[part]}, now {content[part]}; "
                "move it away, or write elsewhere with --output"
            )
    return list(earlier["runs"])


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not yet there, several runs side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with mnist.npz or with MNIST/raw"
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of mnist.json and mnist.md")
    chosen = parser.parse_args(argv)
    command = f"python benchmarks/mnist.py --data-dir DIR --workers {chosen.workers}"
    content: dict[str, Any] = {
        "command": command + (f" --epochs {chosen.epochs}" if chosen.epochs != 100 else ""),
        "machine": {**describe(), "threads": 1},
        "settings": settings(chosen.epochs),
        "runs": [],
    }
    try:
        images(chosen.data_dir)  # a wrong folder shows here, not in every worker
        content["runs"] = earlier_runs(chosen.output / "mnist.json", content)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    done = {(run["system"], run["seed"]) for run in content["runs"]}
    wanted = [(system, seed) for seed in range(chosen.seeds) for system in chosen.systems]
    chosen.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(chosen.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        left = [run for run in wanted if run not in done]
        futures = [pool.submit(train, *run, chosen.epochs, chosen.data_dir) for run in left]
        for future in as_completed(futures):
            run = future.result()
            content["runs"].append(run)
            write(chosen.output, content)
            print(
                f"{run['system']} seed {run['seed']}: {run['accuracy']:.2f} % in {run['seconds']:.0f} s, "
                f"{len(content['runs'])} of {len(done) + len(left)} runs",
                flush=True,
            )


if __name__ == "__main__":
    main()
