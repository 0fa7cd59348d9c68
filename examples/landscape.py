"""The loss landscape of sparse training: paths between two solutions, and whether more training leaves one.

Run it as ``python examples/landscape.py``; it needs ``pip install 'lightning-rigl[examples,plot]'``.

References: Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, section 4.4, figure 6; Garipov
et al., *Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs*, NeurIPS 2018, arXiv:1802.10026.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data import Batches, Digits
from digits import BATCH_SIZE, DROP_FRACTION, UPDATES, images, quiet
from lightning_rigl import Method, RigLCallback, UpdateSchedule
from lightning_rigl.methods.gradual import Gradual
from networks import Classifier, mlp

EPOCHS = {"digits": 80, "mnist": 5}
LINE = "straight line"
CURVES = {"quadratic, sparse": 2, "cubic, sparse": 3, "quadratic, full": 2, "cubic, full": 3}  # degrees
STYLES = dict(zip((LINE, *CURVES), ("k:", "C1", "C1--", "C2", "C2--"), strict=True))
TS = [i / 30 for i in range(31)]  # where on a path the loss is computed
CURVE_RATE = 0.01

NOTES = """\
It is the cross entropy over all training images. Both solutions have the same initial weights and as many \
connections. Barrier: the highest loss on a path minus the higher one of its ends. A curve starts as the \
straight line and is optimised for so many steps. sparse: with connections that either solution has. full: \
with all. There is no batch normalisation, so a point on a path is its weights and nothing else."""

Batch = tuple[Tensor, Tensor]


def bezier(points: Tensor, t: float) -> Tensor:
    """The point at ``t`` in [0, 1] of the Bezier curve with these control points, one a row."""
    degree = len(points) - 1
    shares = [math.comb(degree, i) * t**i * (1 - t) ** (degree - i) for i in range(degree + 1)]
    return torch.tensor(shares, dtype=points.dtype) @ points


def straight(start: Tensor, end: Tensor, degree: int) -> Tensor:
    """The control points with which a Bezier curve runs straight from start to end at a constant pace."""
    return torch.stack([torch.lerp(start, end, i / degree) for i in range(degree + 1)])


def optimise(
    points: Tensor,
    free: Tensor,
    loss: Callable[[Tensor, Any], Tensor],
    batches: Iterable[Any],
    lr: float,
    seed: int,
) -> Tensor:
    """Lower the mean loss over a curve by moving its inner control points; the ends stay.

    Args:
        points: control points, one a row.
        free: the coordinates that may change, True or False each.
        loss: of a point, on a batch.
        batches: one for each step of Adam, which sees the curve at one t, uniform in [0, 1].
        lr: the learning rate.
        seed: of the draw of t.
    """
    draw = torch.Generator().manual_seed(seed)
    inner = points[1:-1].clone().requires_grad_()
    optimizer = torch.optim.Adam([inner], lr)
    for batch in batches:
        curve = torch.cat((points[:1], inner, points[-1:]))
        here = bezier(curve, float(torch.rand((), generator=draw)))
        (gradient,) = torch.autograd.grad(loss(here, batch), inner)
        inner.grad = gradient.masked_fill(~free, 0.0)
        optimizer.step()
    return torch.cat((points[:1], inner.detach(), points[-1:]))


def loss_along(points: Tensor, ts: Iterable[float], loss: Callable[[Tensor], Tensor]) -> list[float]:
    """The loss at some points of a curve."""
    with torch.no_grad():
        return [float(loss(bezier(points, t))) for t in ts]


def barrier(losses: Sequence[float]) -> float:
    """How far a path rises above both of its ends."""
    return max(losses) - max(losses[0], losses[-1])


def loss_of(net: nn.Module) -> Callable[[Tensor, Batch], Tensor]:
    """The loss of a network on a batch as a function of all its parameters in one vector."""
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(weights: Tensor, batch: Batch) -> Tensor:
        parts = zip(shapes.items(), weights.split(sizes), strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in parts}
        return cross_entropy(functional_call(net, parameters, batch[0]), batch[1])

    return loss


@dataclass(frozen=True)
class Solution:
    """Trained weights, and where they may be nonzero, as vectors; the masks; the loss after each epoch."""

    weights: Tensor
    inside: Tensor
    masks: dict[str, Tensor]
    losses: list[float]


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    data: Batch  # all training images and their labels
    sparsity: float
    epochs: int
    seed: int

    @property
    def batches(self) -> Batches:
        """The same data in shuffled batches, from the first epoch."""
        return Batches(*self.data, BATCH_SIZE, seed=self.seed)

    def network(self) -> Classifier:
        """The network with its initial weights, the same each time."""
        seed_everything(self.seed, verbose=False)
        return Classifier(mlp(self.data[0][0].numel()))

    def train(self, method: Method | str, start: Solution | None = None) -> Solution:
        """Train from the initial weights with random masks, or on from the weights and masks of a start."""
        module, losses = self.network(), list[float]()
        if start:
            vector_to_parameters(start.weights.clone(), module.net.parameters())
        every = max(1, self.epochs * len(self.batches) // UPDATES)
        schedule = UpdateSchedule(every, DROP_FRACTION) if method == "rigl" else None
        init = start.masks if start else "random"
        rigl = RigLCallback(self.sparsity, method, schedule=schedule, init=init, seed=self.seed)

        @torch.no_grad()
        def note(*_: Any) -> None:
            losses.append(float(cross_entropy(module.net(self.data[0]), self.data[1])))

        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        off, callbacks = dict.fromkeys(names, False), [rigl, LambdaCallback(on_train_epoch_end=note)]
        # on the CPU: this network is too small for anything else to pay
        trainer = Trainer(max_epochs=self.epochs, accelerator="cpu", callbacks=callbacks, **off)
        trainer.fit(module, self.batches)
        dense = {name: torch.ones_like(p, dtype=torch.bool) for name, p in module.named_parameters()}
        inside = parameters_to_vector((dense | rigl.masks).values())
        weights = parameters_to_vector(module.net.parameters()).detach()
        return Solution(weights, inside, rigl.masks, losses)

    def paths(self, start: Solution, end: Solution, budgets: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The loss along the straight line, and along each curve after each number of steps."""
        loss, union = loss_of(self.network().net), start.inside | end.inside

        def row(path: str, steps: int, points: Tensor) -> dict[str, Any]:
            losses = loss_along(points, TS, lambda weights: loss(weights, self.data))
            seen = {"barrier": barrier(losses), "mean": sum(losses) / len(losses), "losses": losses}
            return {"path": path, "steps": steps, **seen}

        yield row(LINE, 0, straight(start.weights, end.weights, 1))
        for steps in budgets:
            for name, degree in CURVES.items():
                free = union if "sparse" in name else torch.ones_like(union)
                points = straight(start.weights, end.weights, degree)
                batches = islice(chain.from_iterable(repeat(self.batches)), steps)
                yield row(name, steps, optimise(points, free, loss, batches, CURVE_RATE, self.seed))


def draw(rows: Sequence[dict[str, Any]], again: dict[str, list[float]]) -> Figure:
    """The loss along the paths, a panel for each number of steps, and the loss of training on from Static."""
    budgets = sorted({row["steps"] for row in rows if row["steps"]})
    figure = Figure(figsize=(4.0 * len(budgets) + 4.6, 3.8), layout="compressed")
    *panels, last = figure.subplots(1, len(budgets) + 1)
    for axes, steps in zip(panels, budgets, strict=True):
        for row in rows:
            if row["steps"] in (0, steps):
                axes.plot(TS, row["losses"], STYLES[row["path"]], label=row["path"])
        axes.set(title=f"curves after {steps:,} steps", xlabel="from gradual (0) to static (1)")
        axes.set_ylim(0, 1.05 * max(max(row["losses"]) for row in rows))
        axes.grid(alpha=0.3)
    for i, (name, losses) in enumerate(again.items(), 3):
        last.plot(losses, f"C{i}", label=name)
    last.set(title="training on from static", xlabel="epoch", yscale="log")
    last.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[0].legend(fontsize="small")
    last.legend(fontsize="small", loc="center right")
    return figure


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Digits]:
    """What the user asks for, and the images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=tuple(EPOCHS), default="digits", help="digits needs no download")
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz or with MNIST/raw")
    parser.add_argument("--sparsity", type=float, default=0.98, help="fraction of zeros")
    parser.add_argument("--epochs", type=int, help="of each training; by default 80, and 5 on MNIST")
    parser.add_argument("--steps", nargs="+", type=int, default=(30, 1000), help="to optimise each curve")
    parser.add_argument("--seed", type=int, default=0, help="of weights, masks and batches")
    parser.add_argument("--output", type=Path, default=Path("outputs/landscape"), help="folder of the files")
    chosen = parser.parse_args(argv)
    chosen.epochs = EPOCHS[chosen.data] if chosen.epochs is None else chosen.epochs
    if min(chosen.epochs, *chosen.steps) < 1:
        parser.error(f"--epochs and --steps must be at least 1, got {chosen.epochs} and {chosen.steps}")
    if not 0 <= chosen.sparsity < 1:
        parser.error(f"--sparsity must lie in [0, 1), got {chosen.sparsity}")
    try:
        return chosen, images(chosen.data, chosen.data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, walk the paths, train on, and write what was seen."""
    begun, console = time.perf_counter(), Console()
    chosen, digits = arguments(argv)
    bench = Bench((digits.train_images, digits.train_labels), chosen.sparsity, chosen.epochs, chosen.seed)
    with quiet():
        static, gradual = bench.train("static"), bench.train(Gradual())
        on = {name: bench.train(name, start=static).losses for name in ("static", "rigl")}
    again = {name: [static.losses[-1], *losses] for name, losses in on.items()}
    rows = list(bench.paths(gradual, static, sorted(set(chosen.steps))))
    chosen.output.mkdir(parents=True, exist_ok=True)
    stored = {"data": chosen.data, "sparsity": chosen.sparsity, "epochs": chosen.epochs, "seed": chosen.seed,
              "paths": rows, "training_on": again}  # fmt: skip
    (chosen.output / "landscape.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    draw(rows, again).savefig(chosen.output / "landscape.png", dpi=150)
    console.print(f"{'path':20}{'steps':>8}{'barrier':>10}{'mean loss':>12}", style="bold")
    for row in rows:
        line = f"{row['path']:20}{row['steps']:8,}{row['barrier']:10.3f}{row['mean']:12.3f}"
        console.print(line, highlight=False)
    ends = f"gradual {gradual.losses[-1]:.3f}, static {static.losses[-1]:.3f}"
    console.print(f"Loss at the ends: {ends}. {NOTES}", highlight=False)
    for name, losses in again.items():
        console.print(f"{name} on from the static solution: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    console.print(f"Written to {chosen.output} after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
