"""What counting FLOPs costs: the callback on each step, and measuring a model once.

    python benchmarks/flops.py          about two minutes on two cores; writes results/flops.json

Callback: ResNet-50 at 90 % with `RigLCallback` and `FLOPsCallback`; the ratio is the time spent in the hooks
of `FLOPsCallback` over the time of a step. Measuring: ResNet-50 and GPT-2 small, each in a process of its
own, the first time and again; memory is what the process takes at its peak beyond the model and the batch.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from lightning_rigl import FLOPsCallback, RigLCallback
from lightning_rigl.flops.formulas import forward_cost
from lightning_rigl.flops.measure import measure
from machine import describe, store
from overhead import ORDINARY, ResNet50, StepTimes, fit

STATUS = Path("/proc/self/status")  # Linux only


class Timed(FLOPsCallback):
    """The callback, with the time spent in its hooks of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def _time(self, hook: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        hook(*arguments)
        self.steps[-1] += time.perf_counter() - start

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Timed, as the first of a step."""
        self.steps.append(0)
        self._time(super().on_train_batch_start, arguments)

    def on_after_backward(self, *arguments: Any) -> None:
        """Timed."""
        self._time(super().on_after_backward, arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Timed."""
        self._time(super().on_train_batch_end, arguments)


class Block(nn.Module):
    """Causal attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).movedim((2, 1), (0, 3))
        x = x + self.proj(scaled_dot_product_attention(q, k, v, is_causal=True).movedim(1, 2).flatten(2))
        return x + self.out(gelu(self.fc(self.ln2(x))))


class GPT2Small(nn.Module):
    """12 blocks of 12 heads, 768 wide, with a head tied to the lookup: 124 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks, self.norm = nn.Sequential(*(Block(768, 12) for _ in range(12))), nn.LayerNorm(768)
        self.head = nn.Linear(768, 50257, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """(N, T) -> (N, T, 50257)."""
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


def images(batch: int) -> Tensor:
    """Noise of 224 x 224 pixels."""
    return torch.randn(batch, 3, 224, 224)


def texts() -> Tensor:
    """Four texts of 1024 words."""
    return torch.randint(0, 50257, (4, 1024))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet50_batch_32_224px": (ResNet50, lambda: images(32)),
    "gpt2_small_batch_4_1024_words": (GPT2Small, texts),
}


def callback(steps: int) -> dict[str, Any]:
    """The hooks of an ordinary step beside the step."""
    times, flops = StepTimes(), Timed()
    batch = images(16), torch.randint(0, 1000, (16,))
    fit(ResNet50(), batch, steps, times, RigLCallback(sparsity=0.9, schedule=ORDINARY, seed=0), flops)
    step, hooks = times.median(skip=2), statistics.median(flops.steps[2:])
    return {
        "step_ms": round(1e3 * step, 1),
        "hooks_ms": round(1e3 * hooks, 4),
        "hooks_over_step": round(hooks / step, 8),
        "hooks_of_first_step_ms": round(1e3 * flops.steps[0], 1),
        "steps": steps,
    }


def memory(line: str) -> float:
    """A line of the process's status, in MB."""
    return (
        next(int(text.split()[1]) for text in STATUS.read_text().splitlines() if text.startswith(line)) / 1e3
    )


def measured(name: str, repeats: int) -> dict[str, Any]:
    """Time and peak memory of measuring a model, for the first time in this process and again."""
    build, draw = MODELS[name]
    model, batch = build(), draw()
    seconds, peaks = [], []
    for _ in range(1 + repeats):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start = memory("VmRSS"), time.perf_counter()
        table = measure(model, batch)
        seconds.append(time.perf_counter() - start)
        peaks.append(memory("VmHWM") - before)
    return {
        "first_seconds": round(seconds[0], 3),
        "seconds": round(statistics.median(seconds[1:]), 3),
        "first_peak_mb": round(peaks[0], 1),
        "peak_mb": round(max(peaks[1:]), 1),
        "batch_mb": round(batch.numel() * batch.element_size() / 1e6, 1),
        "weights_mb": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1),
        "forward_flops_per_sample": forward_cost(table),
        "repeats": repeats,
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of ResNet-50")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    result = {"command": "python benchmarks/flops.py", "machine": describe()}
    for name in MODELS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result[f"measure_{name}"] = pool.apply(measured, (name, 7))
    result["callback_resnet50_batch_16_224px"] = callback(arguments.steps)
    for name, value in result.items():
        print(name, value)
    print("stored in", store("flops", result).name)


if __name__ == "__main__":
    main()
