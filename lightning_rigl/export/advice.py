"""Which form of a sparse model is fastest on this machine: measured, not promised."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_rigl.export.agreement import compare
from lightning_rigl.export.compaction import compact
from lightning_rigl.export.copies import inference_copy
from lightning_rigl.export.rounds import Timing, rounds, timings
from lightning_rigl.export.sparse_model import Backend, sparse, sparse_report
from lightning_rigl.topology.tables import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MARGIN = 0.03  # a variant is faster if it gains more than this in three of four rounds
_WARM = 2  # runs before the first that counts


@dataclass(frozen=True)
class Variant:
    """One form of a model.

    Args:
        name: what it is.
        timing: how long it takes; None if it was not measured.
        difference: largest difference of its outputs from the dense ones; None if it was not run.
        reason: why it is not to be had, or not to be recommended; empty if it is.
    """

    name: str
    timing: Timing | None = None
    difference: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Advice:
    """What `advise` has measured.

    Args:
        variants: the dense model first.
        best: name of the fastest one; ``dense`` unless another is faster beyond the noise.
        model: that one, in evaluation mode.
        place: device and threads.
    """

    variants: tuple[Variant, ...]
    best: str
    model: nn.Module
    place: str

    def table(self) -> Table:
        """One row per variant; why some are not measured or not recommended stands in the title."""
        title = [f"inference on the example, measured on {self.place}"]
        title += [f"{v.name}: {v.reason}" for v in self.variants if v.reason]
        columns = ("variant", "milliseconds", "times as fast", "largest difference")
        return Table(
            "\n".join(title), columns, tuple(map(_row, self.variants)), (f"best: {self.best}", "", "", "")
        )

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> RichTable:
        return self.table().__rich__()


def advise(model: nn.Module, example: Any, seconds: float = 10.0, compile: bool = True) -> Advice:  # noqa: A002
    """Measure a model's inference as it is, compiled, compacted and with its zeros skipped.

    The variants run in turns, in evaluation mode and without gradients, on the example; each one's outputs
    are held against the dense model's. A variant that is not to be had here, or is wrong, is listed with the
    reason and never recommended. The advice holds for this machine, this number of threads and this size of
    the input.

    Args:
        model: a trained module whose inactive weights are exactly zero, on any device; it is not changed.
        example: the input as it will be: a tensor, or a tuple of positional arguments, on the model's device.
        seconds: how long to measure, about; compiling and exporting come on top.
        compile: whether to try ``torch.compile``, too.

    Raises:
        TypeError: no module.
        ValueError: ``seconds`` is not above 0; the model cannot be copied or does not run on the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> advice = advise(model, torch.randn(8, 20), seconds=0.1, compile=False)
        >>> tuple(variant.name for variant in advice.variants)
        ('dense', 'compacted', 'sparse torch', 'sparse native', 'compacted and sparse')
    """
    if not seconds > 0:
        raise ValueError(f"seconds: how long to measure, above 0, got {seconds!r}")
    args = example if isinstance(example, tuple) else (example,)
    dense = inference_copy(model)
    expected = _first(dense, args)
    forms: dict[str, Callable[[], nn.Module]] = {
        **({"dense compiled": lambda: _compiled(dense)} if compile else {}),
        "compacted": lambda: _compacted(dense, example),
        "sparse torch": lambda: _sparse(dense, "torch"),
        "sparse native": lambda: _sparse(dense, "native"),
        "compacted and sparse": lambda: _sparse(_compacted(dense, example), "auto"),
    }
    models: dict[str, nn.Module] = {"dense": dense}
    said = {"dense": Variant("dense", difference=0.0)}
    for name, form in forms.items():
        models[name], said[name] = _checked(name, form, args, expected)
    usable = {name: models[name] for name, variant in said.items() if not variant.reason}
    found = _timed(usable, args, seconds)
    variants = tuple(replace(variant, timing=found.get(name)) for name, variant in said.items())
    faster = {name: timing.ratio for name, timing in found.items() if timing.low > 1 + MARGIN}
    best = max(faster, key=lambda name: faster[name], default="dense")
    return Advice(variants, best, models[best], _place(args))


def _first(dense: nn.Module, args: tuple[Any, ...]) -> Any:
    try:
        return _outputs(dense, args)
    except Exception as error:
        raise ValueError(
            f"{type(dense).__name__} does not run on the example ({type(error).__name__}: {_line(error)}): "
            "give a tensor, or a tuple of positional arguments, as the model takes them and on its device"
        ) from error


def _compiled(dense: nn.Module) -> nn.Module:
    fast: Any = torch.compile(dense)
    return fast  # type: ignore[no-any-return]


def _compacted(dense: nn.Module, example: Any) -> nn.Module:
    small = compact(dense, example)
    before, after = small.report.parameters
    if after == before:
        raise _NothingToGainError("no input, neuron or channel is dead, there is nothing to remove")
    return small


def _sparse(dense: nn.Module, backend: Backend) -> nn.Module:
    with warnings.catch_warnings():  # of missing kernels, which the table has beside "sparse native"
        warnings.filterwarnings("ignore", message="export.sparse: ")
        fast = sparse(dense, backend)
    report = sparse_report(fast)
    if not report.sparse:
        why = ", ".join(dict.fromkeys(report.reasons.values())) or "there is no linear layer"
        raise _NothingToGainError(f"no layer can skip its zeros with a gain: {why}")
    return fast


class _NothingToGainError(Exception):
    """A variant would be the dense model again; the message says why."""


def _checked(
    name: str, form: Callable[[], nn.Module], args: tuple[Any, ...], expected: Any
) -> tuple[nn.Module, Variant]:
    """A variant, and whether it computes what the dense model does."""
    try:
        model = form()
        got = _outputs(model, args)
    except _NothingToGainError as error:
        return nn.Module(), Variant(name, reason=str(error))
    except Exception as error:  # whatever a compiler, or an exporter, does not know
        return nn.Module(), Variant(name, reason=f"not possible, {type(error).__name__}: {_line(error)}")
    difference, right = compare(expected, got)
    reason = "" if right else f"wrong: its outputs differ from the dense ones by {difference:.2g}"
    return model, Variant(name, difference=difference, reason=reason)


def _outputs(model: nn.Module, args: tuple[Any, ...]) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model(*_fresh(args))


def _timed(models: dict[str, nn.Module], args: tuple[Any, ...], seconds: float) -> dict[str, Timing]:
    def prepare(model: nn.Module) -> Callable[[], object]:
        own = _fresh(args)

        def run() -> None:
            model(*own)
            _wait(args)

        return run

    runs = {name: partial(prepare, model) for name, model in models.items()}
    with torch.no_grad():
        for _ in range(_WARM):
            for make in runs.values():
                make()()
        _wait(args)
        return timings(rounds(runs, seconds))


def _fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that a model may write to."""
    copied: tuple[Any, ...] = tree_map(
        lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), args
    )
    return copied


def _devices(args: tuple[Any, ...]) -> list[torch.device]:
    return list(dict.fromkeys(x.device for x in tree_leaves(args) if isinstance(x, Tensor)))


def _wait(args: tuple[Any, ...]) -> None:
    for device in _devices(args):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _place(args: tuple[Any, ...]) -> str:
    devices = [str(d) for d in _devices(args) if d.type != "cpu"]
    return ", ".join(devices) or f"the CPU with {torch.get_num_threads()} thread(s)"


def _line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _row(variant: Variant) -> tuple[str, ...]:
    timing, difference = variant.timing, variant.difference
    time = ("not measured", "") if timing is None else (f"{1e3 * timing.seconds:.3f}", f"{timing.ratio:.2f}x")
    return variant.name, *time, "" if difference is None else f"{difference:.2g}"
