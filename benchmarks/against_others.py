"""This package beside rigl-torch 0.5.2 and sparsimony 0.1.0: masking, a topology update, a training step.

    pip install --no-deps --target others rigl-torch==0.5.2 sparsimony==0.1.0
    python benchmarks/against_others.py --others others             under three minutes on two cores
    python benchmarks/against_others.py --others others update      one part of it

``masking``: what an ordinary step costs more than the step of a dense model. The passes of ResNet-50 and of
an MLP are replaced by a copy of a gradient for each weight, so that the cost does not drown in them; the
optimizer is SGD with momentum. "difference" is the step less the dense step of that round; "calls" is the
time inside our two calls, which are all we do, and the ratio is taken of it: it is the larger one (some
gradients may be in the cache then). "floor" reads and writes every gradient once. ``update``: the call
that updates the topology of ResNet-50. ``training``: whole steps of the MLP as shipped, ordinary ones, and
all of them with the update that comes every 100 steps. Contenders take turns; a ratio is the median over
rounds. All keep every weight sparse, by uniform masks; in ``training`` each follows its defaults (rigl-torch
leaves the first layer dense, ours is ERK), and torch's MKL is as it comes.

rigl-torch asks torchvision for two classes, to descend into them as into any module: empty ones stand in.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_rigl import ActiveSGD, Sparsifier, UpdateSchedule
from lightning_rigl.kernels import library
from lightning_rigl.topology.distributions import Uniform
from machine import RESULTS, describe, store

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from paper_networks import ResNet50

NEEDED = {"rigl-torch": "0.5.2", "sparsimony": "0.1.0"}
NEVER = 1_000_000  # steps between updates, where none is wanted
FRACTION = 0.3  # of the connections dropped in an update, everybody's default
TARGETS = {
    "masking": {"integers": 8.0, "native bits": 15.0},
    "update": {"torch": 20.0, "native": 60.0},
    "training": {"native": 5.0},
}


def import_others(folder: Path) -> None:
    """Make the two packages importable from a folder; SystemExit if they are not there."""
    found = {
        d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions(path=[str(folder)])
    }
    for name, version in NEEDED.items():
        if found.get(name) != version:
            wanted = " ".join(f"{name}=={version}" for name, version in NEEDED.items())
            raise SystemExit(
                f"{folder}: {name} {version} is asked for and {found.get(name, 'none')} is there; "
                f"pip install --no-deps --target {folder} {wanted}"
            )
    sys.path.append(str(folder))
    if "torchvision" not in sys.modules:
        resnet = ModuleType("torchvision.models.resnet")
        resnet.Bottleneck, resnet.BasicBlock = type("Bottleneck", (), {}), type("BasicBlock", (), {})  # type: ignore[attr-defined]
        models, torchvision = ModuleType("torchvision.models"), ModuleType("torchvision")
        models.resnet, torchvision.models = resnet, models  # type: ignore[attr-defined]
        sys.modules["torchvision"] = torchvision
        importlib.import_module("rigl_torch.RigL")
        del sys.modules["torchvision"]  # it has what it wants


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Fused: the fastest on a CPU, so that no ratio is flattered."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True)


def layers(net: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Those that become sparse."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


class Dense:
    """A model and its optimizer; and what stands between a backward pass and the next step."""

    def __init__(self, net: nn.Module, sparsity: float, every: int, alike: bool) -> None:
        self.net, self.spent = net, 0.0  # seconds inside the package's calls of the last step
        self.optimizer = self.make()
        self.begin(sparsity, every, alike)

    def make(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return sgd(self.net.parameters())

    def begin(self, sparsity: float, every: int, alike: bool) -> None:
        """Make the model sparse; ``alike``: every weight is, else as the package's defaults have it."""

    def finish(self, step: int) -> None:
        """From the end of the backward pass to the end of the optimizer's step."""
        self.optimizer.step()

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call, and add the time to what is spent."""
        start = time.perf_counter()
        answer = call(*arguments)
        self.spent += time.perf_counter() - start
        return answer


class Floor(Dense):
    """A dense model, every gradient of which is read and written once more."""

    def finish(self, step: int) -> None:
        """Times one."""
        for layer in layers(self.net).values():
            assert layer.weight.grad is not None
            layer.weight.grad.mul_(1.0)
        self.optimizer.step()


class RiglTorch(Dense):
    """rigl-torch."""

    def begin(self, sparsity: float, every: int, alike: bool) -> None:
        """Its exemption of the first layer goes to one of one weight, if all are to be alike."""
        net = nn.ModuleList([nn.Linear(1, 1), self.net]) if alike else self.net
        self.scheduler = importlib.import_module("rigl_torch.RigL").RigLScheduler(
            net,
            self.optimizer,
            1 - sparsity,
            100 * NEVER,
            ignore_linear_layers=False,
            delta=every,
            alpha=FRACTION,
        )

    def finish(self, step: int) -> None:
        """As its readme says."""
        if self.timed(self.scheduler):
            self.optimizer.step()


class Sparsimony(Dense):
    """Sparsimony."""

    def begin(self, sparsity: float, every: int, alike: bool) -> None:
        """A parametrization of each weight."""
        module = importlib.import_module
        self.sparsifier = module("sparsimony.dst.rigl").RigL(
            module("sparsimony.schedulers.base").CosineDecayScheduler(FRACTION, 100 * NEVER, every),
            module("sparsimony.distributions.base").UniformDistribution(),
            self.optimizer,
            sparsity,
            init_method=None,
        )
        self.sparsifier.prepare(self.net, [{"tensor_fqn": f"{name}.weight"} for name in layers(self.net)])
        for (
            group
        ) in self.sparsifier.groups:  # it adds up gradients until the first update, and then before one
            group["module"].parametrizations.weight[0].accumulate = False

    def finish(self, step: int) -> None:
        """Its step follows the optimizer's."""
        self.optimizer.step()
        self.timed(self.sparsifier.step)


class Ours(Dense):
    """This package, with the kernels."""

    kernels, compute = True, "dense"

    def begin(self, sparsity: float, every: int, alike: bool) -> None:
        """Masks alone, unless ``compute`` says more."""
        with self.masked():
            self.sparsifier = Sparsifier(
                self.net,
                sparsity,
                distribution=Uniform(dense_first=False) if alike else "erk",
                schedule=UpdateSchedule(every, FRACTION, end=100 * NEVER),
                seed=0,
                compute=self.compute,  # type: ignore[arg-type]
            )
            self.sparsifier.start()

    def masked(self) -> Any:
        """Where there are kernels or none."""
        return nullcontext(library.load()) if self.kernels else patch.object(library, "loaded", lambda: None)

    def finish(self, step: int) -> None:
        """As our readme says."""
        with self.masked():
            self.timed(self.sparsifier.before_step, self.optimizer, step)
            self.optimizer.step()
            self.timed(self.sparsifier.after_step)


class OursWithout(Ours):
    """This package, without the kernels."""

    kernels = False


class OursNative(Ours):
    """This package, whose linear layers compute sparsely."""

    compute = "native"


class OursActive(OursNative):
    """The same, and its optimizer steps active connections only."""

    def make(self) -> torch.optim.Optimizer:
        """The same SGD."""
        return ActiveSGD(self.net.parameters(), 0.01, momentum=0.9, active_gradients=True)


class Touched(torch.autograd.Function):
    """Uses a weight: nothing is computed, and its gradient is a copy of a given one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        """Zero."""
        ctx.gradient = gradient
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The copy."""
        return ctx.gradient.clone(), None


_touched: Callable[[Tensor, Tensor], Tensor] = Touched.apply


def touch(net: nn.Module) -> Callable[[nn.Module], Tensor]:
    """A loss for models with the layers of this one."""
    gradients = [torch.randn_like(layer.weight) for layer in layers(net).values()]

    def loss(net: nn.Module) -> Tensor:
        own = [layer.weight for layer in layers(net).values()]
        return torch.stack([_touched(w, g) for w, g in zip(own, gradients, strict=True)]).sum()

    return loss


def mlp() -> nn.Module:
    """3072-1024-1024-1024-10."""
    return nn.Sequential(
        *(nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
        *(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def one_step(own: Dense, loss: Callable[[nn.Module], Tensor], step: int) -> float:
    """Its seconds."""
    own.spent, start = 0.0, time.perf_counter()
    own.optimizer.zero_grad()
    torch.autograd.backward(loss(own.net))
    own.finish(step)
    return time.perf_counter() - start


def over(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of their time / ours."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians."""
    return {name: round(1e3 * statistics.median(own), 3) for name, own in times.items()}


def ratios(times: Mapping[str, Sequence[float]], ours: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of each other package to each of our ways."""
    return {
        way: {name: over(times[name], own) for name in NEEDED}
        for way, own in ours.items()
        if way not in NEEDED
    }


def masking(make: Callable[[], nn.Module], rounds: int) -> dict[str, Any]:
    """Ordinary steps at 90 %."""
    runs = {"dense": Dense, "rigl-torch": RiglTorch, "sparsimony": Sparsimony}
    runs |= {"integers": OursWithout, "native bits": Ours, "floor": Floor}
    loss = touch(make())
    contenders = {name: run(make(), 0.9, NEVER, alike=True) for name, run in runs.items()}
    steps: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, list[float]] = {"integers": [], "native bits": []}
    for step in range(rounds + 3):
        for name, own in contenders.items():
            steps[name].append(one_step(own, loss, step))
            calls.get(name, []).append(own.spent)
    steps, calls = ({name: own[3:] for name, own in each.items()} for each in (steps, calls))  # warm by then
    extra = {n: [a - b for a, b in zip(own, steps["dense"], strict=True)] for n, own in steps.items()}
    del extra["dense"]
    return {
        "rounds": rounds,
        "dense_step_ms": milliseconds(steps)["dense"],
        "difference_ms": milliseconds(extra),
        "calls_ms": milliseconds(calls),
        "ratio": ratios(extra, calls),
    }


def update(rounds: int) -> dict[str, Any]:
    """All layers of ResNet-50 at 90 %."""
    runs = {"rigl-torch": RiglTorch, "sparsimony": Sparsimony, "torch": OursWithout, "native": Ours}
    loss = touch(ResNet50())
    contenders = {name: run(ResNet50(), 0.9, 2, alike=True) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(2 * rounds + 3):
        for name, own in contenders.items():
            one_step(own, loss, step)
            before = step if name in ("torch", "native") else step + 1  # they count a step before they look
            if step > 2 and before % 2 == 0:
                times[name].append(own.spent)
    return {"rounds": rounds, "milliseconds": milliseconds(times), "ratio": ratios(times, times)}


def training(rounds: int) -> dict[str, Any]:
    """The MLP at 95 %, a round of 100 steps with one update each."""
    runs = {"dense": Dense, "rigl-torch": RiglTorch, "sparsimony": Sparsimony}
    runs |= {"native": OursNative, "native, ActiveSGD": OursActive}
    x, y = torch.randn(128, 3072), torch.randint(10, (128,))
    contenders = {name: run(mlp(), 0.95, 100, alike=False) for name, run in runs.items()}
    ordinary: dict[str, list[float]] = {name: [] for name in runs}
    all_steps: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        for name, own in contenders.items():
            steps = range(100 * done + 1, 100 * done + 101)
            times = [one_step(own, lambda net: cross_entropy(net(x), y), step) for step in steps]
            ordinary[name].append(statistics.median(times))
            all_steps[name].append(statistics.fmean(times))
    ours = [name for name in runs if name.startswith("native")]
    return {
        "rounds": rounds,
        "ordinary_ms": milliseconds(ordinary),
        "with_updates_ms": milliseconds(all_steps),
        "ratio": ratios(ordinary, {name: ordinary[name] for name in ours}),
        "ratio_with_updates": ratios(all_steps, {name: all_steps[name] for name in ours}),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "masking ResNet-50": lambda: masking(ResNet50, 25),
    "masking MLP": lambda: masking(mlp, 100),
    "update": lambda: update(4),
    "training": lambda: training(4),
}


def table(found: Mapping[str, Any]) -> str:
    """A line for each of our ways: how many times the others' time it is less by, and the target."""
    lines = [f"{'part':30}{'our way':20}" + "".join(f"{name:>14}" for name in (*NEEDED, "target"))]
    for part, content in found.items():
        for key in ("ratio", "ratio_with_updates"):
            for way, each in content.get(key, {}).items():
                target = TARGETS[part.split()[0]].get(way)
                name = part + (", with updates" if key != "ratio" else "")
                cells = [f"{each[other]:.1f}x" for other in NEEDED] + [f"{target:g}x" if target else ""]
                lines.append(f"{name:30}{way:20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store; parts that are not asked for stay as they are stored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(TARGETS)}; all without any")
    parser.add_argument(
        "--others", type=Path, required=True, metavar="FOLDER", help="where the two are installed"
    )
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.parts) - set(TARGETS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    import_others(chosen.others)
    if library.load() is None:
        raise SystemExit(f"the native kernels are to be measured, and there are none: {library.why_not()}")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    file = RESULTS / "against_others.json"
    found = json.loads(file.read_text())["parts"] if file.is_file() else {}
    for name, measure in PARTS.items():
        if not chosen.parts or name.split()[0] in chosen.parts:
            found[name] = {"machine": describe(), **measure()}
            print(name, {key: value for key, value in found[name].items() if key != "machine"}, flush=True)
    parts = {name: found[name] for name in PARTS if name in found}
    store("against_others", {"others": NEEDED, "parts": parts})
    print(table(parts))


if __name__ == "__main__":
    main()
