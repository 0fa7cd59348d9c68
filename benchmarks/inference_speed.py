"""Milliseconds of inference with weights that are mostly zero, beside dense inference, in interleaved rounds.

    python benchmarks/inference_speed.py vit         ViT-B, 1 image; one minute
    python benchmarks/inference_speed.py mlp         3072-1024-1024-1024-10, batch 64; ten seconds

The weights are random and so are their masks: the zeros alone decide on the speed. Every round runs each
variant once, or for a few milliseconds if it is faster than that. The ratio of a round is dense time over
the variant's; the median over rounds is stored under ``results/``. The dense baseline, float32 and eager, is
by default the fair one: MKL with its best kernels, whoever made the processor; ``--as-shipped`` takes torch
as it comes. Dense inference is also given compiled by torch.compile, where there is a compiler, and in
bfloat16; the outputs of every sparse variant are checked.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dense_baseline import fair, start_fair
from lightning_rigl.export.sparse_model import sparse
from machine import describe, store
from vision_transformer import ViT

SHORTEST = 0.005  # seconds of one measurement at least


@dataclass(frozen=True)
class Case:
    """A network, its input, and the layers whose weights are zeros for the most part."""

    net: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    masked: Callable[[str], bool]
    sparsities: tuple[float, ...]


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
        *(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


CASES = {
    "vit": Case(ViT, lambda: torch.randn(1, 3, 224, 224), lambda name: "blocks" in name, (0.9, 0.95)),
    "mlp": Case(_mlp, lambda: torch.randn(64, 3072), lambda name: True, (0.9, 0.95, 0.98)),
}


def masked(case: Case, sparsity: float) -> nn.Module:
    """The network with random zeros in its linear layers."""
    torch.manual_seed(0)
    net = case.net().eval().requires_grad_(False)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and case.masked(name):
            module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return net


def runs(case: Case, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """The variants, warm, each as a call without arguments."""
    x = case.input()
    dense = masked(case, 0.0)
    half, half_x = copy.deepcopy(dense).bfloat16(), x.bfloat16()
    found: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense(x), "dense bf16": lambda: half(half_x)}
    if compiled:
        found |= _compiled(dense, x)
    for sparsity in case.sparsities:
        net = masked(case, sparsity)
        for backend in ("torch", "native"):
            fast = sparse(net, backend)  # type: ignore[arg-type]
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
            found[f"{backend} {sparsity:g}"] = lambda fast=fast: fast(x)  # type: ignore[misc]
    return found


def _compiled(net: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        quick = torch.compile(net)
        quick(x)
    except Exception as error:
        print(f"dense compiled: left out, {type(error).__name__}")
        return {}
    return {"dense compiled": lambda: quick(x)}


def milliseconds(run: Callable[[], Tensor]) -> float:
    """The time of one call, the mean over a few milliseconds."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SHORTEST:
        run()
        calls += 1
    return 1e3 * passed / calls


def measure(found: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each variant, and the median over rounds of dense time / its time."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, run in found.items():
            times[name].append(milliseconds(run))
    ratios = {
        name: statistics.median(d / t for d, t in zip(times["dense"], own, strict=True))
        for name, own in times.items()
    }
    return {
        "milliseconds": {name: round(statistics.median(own), 3) for name, own in times.items()},
        "ratio": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure one case, print and store it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--as-shipped", action="store_true", help="the dense baseline is torch as it comes")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled dense variant out")
    chosen = parser.parse_args(argv)
    if not chosen.as_shipped:
        start_fair()
    warnings.filterwarnings("ignore")
    variants = runs(CASES[chosen.case], not chosen.no_compile)
    print(f"{len(variants)} variants, {chosen.rounds} rounds", flush=True)
    found = measure(variants, chosen.rounds)
    for name, ratio in found["ratio"].items():
        print(f"{name:16}{found['milliseconds'][name]:10.2f} ms  {ratio:6.2f}x of dense")
    baseline = "float32, eager, MKL's best kernels" if fair() else "float32, eager, torch as shipped"
    name = f"inference_speed_{chosen.case}" + ("_as_shipped" if chosen.as_shipped else "")
    store(name, {"machine": describe(), "baseline": baseline, "rounds": chosen.rounds, **found})


if __name__ == "__main__":
    main()
