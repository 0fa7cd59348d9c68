"""What a training step of the MLP consists of, natively and with the optimizer of active connections.

    python benchmarks/where_time_goes.py        one minute

The fits are those of training_speed.py, without an update. The passes of a layer are made of the kernels that
they consist of, each timed; "the network's other parts" is what is left of the step after these and the empty
step: activations, the last layer, the loss, biases, and Python. Stored under ``results/``.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_rigl.kernels.library import Library
from machine import describe, store
from training_speed import CASES, Run, fit, rigl

CASE = replace(CASES["mlp"], every=10_000)
NAMES = {
    "lr_gather": "reading active weights",
    "lr_pack": "batches into panels",
    "lr_spmm": "products, forward",
    "lr_spmm back": "products, input gradient",
    "lr_permute": "weights in transposed order",
    "lr_sddmm": "products, weight gradient",
    "lr_sgd": "the optimizer's step",
}


class Stopwatch:
    """In place of `Library.__call__`: makes the passes of their kernels, and times these."""

    def __init__(self) -> None:
        self.plain, self.seconds = Library.__call__, defaultdict[str, float](float)

    def __call__(self, library: Library, name: str, signature: str, *given: Any) -> Any:
        """One call of the kernels."""
        if name == "lr_linear_forward":
            self._forward(library, *given)
            return 1
        if name == "lr_linear_backward":
            self._backward(library, *given)
            return 1
        return self._time(library, name, signature, *given)

    def _time(self, library: Library, name: str, signature: str, *given: Any, mark: str = "") -> Any:
        start = time.perf_counter()
        result = self.plain(library, name, signature, *given)
        self.seconds[name + mark] += time.perf_counter() - start
        return result

    def _forward(self, library: Library, *given: Any) -> None:
        x, batch, inputs, row, column, weight, *rest = given
        starts, columns, wide, bias, outputs, values, panels, _, y, threads = rest
        matrix = (starts, columns, wide)
        self._time(library, "lr_gather", "pnnppipi", weight, inputs, outputs, *matrix, values, threads)
        self._time(library, "lr_pack", "pnnnnpi", x, batch, inputs, row, column, panels, threads)
        product = (panels, batch, inputs, *matrix, values, bias, outputs, y, outputs, threads)
        self._time(library, "lr_spmm", "pnnppippnpni", *product)

    def _backward(self, library: Library, *given: Any) -> None:
        gradient, batch, outputs, row, column, x_panels, values, inputs, starts, columns, wide, *rest = given
        starts_t, columns_t, wide_t, order, count, panels, _, values_t, dx, compact, dense, threads = rest
        self._time(library, "lr_pack", "pnnnnpi", gradient, batch, outputs, row, column, panels, threads)
        if dx is not None:
            self._time(library, "lr_permute", "ppnpi", values, order, count, values_t, threads)
            product = (panels, batch, outputs, starts_t, columns_t, wide_t, values_t, None, inputs)
            self._time(library, "lr_spmm", "pnnppippnpni", *product, dx, inputs, threads, mark=" back")
        if compact is not None:
            matrix = (starts, columns, wide)
            product = (panels, x_panels, batch, inputs, outputs, *matrix, compact, dense, threads)
            self._time(library, "lr_sddmm", "ppnnnppippi", *product)


def parts(sparsity: float) -> dict[str, float]:
    """Milliseconds of a step by what they are spent on."""
    watch = Stopwatch()
    Library.__call__ = lambda library, *given: watch(library, *given)  # type: ignore[method-assign]
    try:
        step = 1e3 * fit(CASE, rigl(CASE, sparsity, "step"))
    finally:
        Library.__call__ = watch.plain  # type: ignore[method-assign]
    tiny = replace(
        CASE, net=lambda: nn.Linear(2, 2), batch=lambda: (torch.zeros(2, 2), torch.zeros(2).long())
    )
    steps = CASE.steps + CASE.warm
    found = {title: 1e3 * watch.seconds[name] / steps for name, title in NAMES.items()}
    found["Lightning's loop, with a network of nothing"] = 1e3 * fit(tiny, Run())
    return {**found, "the network's other parts": step - sum(found.values()), "the step": step}


def main() -> None:
    """Measure, print and store: medians of five fits."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    found = {}
    for sparsity in CASE.sparsities:
        rounds = [parts(sparsity) for _ in range(5)]
        found[f"{sparsity:g}"] = {
            title: round(statistics.median(r[title] for r in rounds), 3) for title in rounds[0]
        }
        print(
            f"{sparsity:g}:",
            *(f"  {title:45}{ms:7.2f} ms" for title, ms in found[f"{sparsity:g}"].items()),
            sep="\n",
        )
    store("where_time_goes", {"machine": describe(), "milliseconds": found})


if __name__ == "__main__":
    main()
