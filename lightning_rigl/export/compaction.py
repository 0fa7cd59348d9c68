"""A smaller dense model that computes the same: dead inputs, neurons and channels physically removed."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lightning_rigl.export import rulebook
from lightning_rigl.export.compact_report import CompactReport, costs
from lightning_rigl.export.context import Context
from lightning_rigl.export.copies import inference_copy
from lightning_rigl.export.dead_units import Liveness, follow
from lightning_rigl.export.feed_forward import cut_feed_forwards
from lightning_rigl.export.shrink import shrink
from lightning_rigl.export.trace import Run, followable, trace


class Compacted(fx.GraphModule):
    """A model made by `compact`: layers of ``torch.nn`` under their old names, with smaller shapes.

    Attributes:
        report: what was removed, see `CompactReport`.
    """

    report: CompactReport

    def __deepcopy__(self, memo: dict[int, Any]) -> Compacted:
        twin = cast(Compacted, super().__deepcopy__(memo))
        twin.report = copy.deepcopy(self.report, memo)
        return twin


def compact(model: nn.Module, example: Any) -> Compacted:
    """Remove every input, neuron and channel that no output depends on, through the whole graph.

    A unit goes if nothing reads it through a weight that is not zero, or if its own weights are zero, so that
    it is a constant: the biases of its readers take that over. Both follow through activations, batch norm,
    residual additions, concatenations, poolings, flattening and grouped convolutions, over and over, until
    nothing is left to remove. What is not understood stays whole (``compacted.report.left`` says what and
    why). Features of the input that no one reads are left out by a `Select` in front, so that the compacted
    model takes the same inputs. Every layer keeps at least one unit.

    The result is for inference: batch norm and dropout are in evaluation mode, and arguments of ``forward``
    that the example does not give are fixed at their defaults. It holds layers of ``torch.nn`` and runs
    wherever they do. Inputs that are not finite may give another result: a weight of zero times infinity is
    NaN, a connection that was removed is nothing.

    Args:
        model: a trained module whose inactive weights are exactly zero; it is not changed.
        example: the input: a tensor, or a tuple of positional arguments, on the model's device. One sample
            is enough.

    Raises:
        TypeError: no module.
        ValueError: the model does not run on the example, cannot be copied, or cannot be followed by
            torch.fx; the message names the way out.
        RuntimeError: the outputs on the example have changed by more than rounding, as they do where the
            forward pass draws random numbers in evaluation mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     model[0].weight[0] = 0  # neuron 0 is a constant, ReLU(bias)
        ...     model[2].weight[:, 2] = 0  # neuron 2 is read by no one
        ...     model[0].weight[1, 3] = 0  # so that input 3 is read by no one
        >>> small = compact(model, torch.randn(1, 4))
        >>> small.get_submodule("0"), small.get_submodule("2")
        (Linear(in_features=3, out_features=1, bias=True), Linear(in_features=1, out_features=2, bias=True))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(small(x), model(x), atol=1e-6)
        True

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134, appendix B: a sparse 784-300-100 network whose dead pixels
        and neurons are removed is a 408-100-69 one.
    """
    _refuse(model)
    args = example if isinstance(example, tuple) else (example,)
    twin = followable(inference_copy(model))
    _bind(model, twin, args)
    graph, whole = trace(twin, args, lambda m: rulebook.of_module(m) is not None)
    run = Run(graph)
    expected = _first_run(model, run, args)
    before = costs(graph, run)
    feed_forwards = cut_feed_forwards(graph)
    context, from_input = follow(graph, run, whole)
    kept_inputs = shrink(context, Liveness(context), from_input)
    small = Compacted(graph, graph.graph, type(model).__name__).eval()
    run = Run(small)
    error = _difference(model, expected, run.once(args))
    small.report = CompactReport(before, costs(small, run), _left(context, feed_forwards), kept_inputs, error)
    return small


def _refuse(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compact: expected a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta or parameter.layout != torch.strided:
            raise ValueError(
                f"{name} has no dense values to look at (lazy, on meta or of a sparse layout): run "
                "a lazy module once, load the weights of one on meta, take to_dense() of a sparse tensor"
            )


def _bind(model: nn.Module, twin: nn.Module, args: tuple[Any, ...]) -> None:
    try:
        inspect.signature(twin.forward).bind(*args)
    except TypeError as error:
        raise ValueError(_does_not_run(model, args, error)) from error


def _first_run(model: nn.Module, run: Run, args: tuple[Any, ...]) -> Any:
    try:
        return run.once(args)
    except Exception as error:
        raise ValueError(_does_not_run(model, args, error)) from error


def _does_not_run(model: nn.Module, args: tuple[Any, ...], error: Exception) -> str:
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}".replace("torch.", "") for t in tensors)
    return (
        f"{type(model).__name__} does not run on the example ({given or 'no tensor'}) in evaluation mode, "
        f"{type(error).__name__}: {error}. Give a tensor, or a tuple of positional arguments, as the model "
        "takes them and on its device"
    )


def _difference(model: nn.Module, expected: Any, got: Any) -> float:
    """The largest difference on the example; by its size rounding is told from a wrong result."""
    worst = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
            continue
        error = (a - b).nan_to_num(0.0).abs().max().item() if a.shape == b.shape else float("inf")
        allowed = _precision(a) ** 0.5 * max(1.0, a.nan_to_num(0.0).abs().max().item())
        if error > allowed or not torch.equal(a.isnan(), b.isnan()):
            raise RuntimeError(
                f"{type(model).__name__}: the compacted model differs by {error:.3g} on the example, more "
                f"than rounding ({allowed:.3g}). If the forward pass draws random numbers in evaluation "
                "mode, take them out; else compact the submodules one by one to find the layer, and report it"
            )
        worst = max(worst, error)
    return worst


def _precision(result: Tensor) -> float:
    """The relative error of one operation; on CUDA products of float32 may be taken in TF32."""
    tf32 = result.is_cuda and result.dtype == torch.float32
    return 2.0**-10 if tf32 else torch.finfo(result.dtype).eps


def _left(context: Context, feed_forwards: set[int]) -> dict[str, str]:
    """Why layers keep units that they could do without, as far as the graph is the reason."""
    found = dict(context.left)
    for name in found:
        if any(id(m) in feed_forwards for m in context.modules[name].modules()):
            found[name] += " but for its feed-forward units"
    for name, reading in context.readings.items():
        why = context.classes.reason(int(reading.outputs[0]))
        if why is not None and not why.endswith("the model's output"):
            found.setdefault(name, why)
    return found
