"""A model as a graph of its layers, and what each step of the graph costs on an example."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

_ASSERTIONS = ("_assert", "_assert_is_none")


def followable(model: nn.Module) -> nn.Module:
    """The model, or, of a bare layer of ``torch.nn``, which a trace would not look into, a ``Sequential``."""
    return nn.Sequential(model) if fx.Tracer().is_leaf_module(model, "") else model


class _Tracer(fx.Tracer):
    """Follows the forward pass down to layers; ``whole`` names the modules that it does not look into."""

    def __init__(self, is_layer: Callable[[nn.Module], bool], whole: dict[str, str]) -> None:
        super().__init__()
        self.is_layer, self.whole = is_layer, whole
        self.failed: str | None = None  # the innermost module that cannot be followed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = super().is_leaf_module(m, module_qualified_name)
        return module_qualified_name in self.whole or leaf or self.is_layer(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def trace(
    model: nn.Module, args: tuple[Any, ...], is_layer: Callable[[nn.Module], bool]
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The model as a graph, and the modules in it that could not be followed, with the reason.

    Args:
        model: a module in the mode it is to be traced in; the graph shares its parameters.
        args: positional inputs; arguments of ``forward`` beyond them are fixed at their defaults.
        is_layer: the modules that are one step of the graph, besides those of ``torch.nn``.

    Raises:
        ValueError: the module's own ``forward`` cannot be followed.
    """
    rest = list(inspect.signature(model.forward).parameters.values())[len(args) :]
    fixed = {p.name: p.default for p in rest if p.default is not inspect.Parameter.empty}
    whole: dict[str, str] = {}
    while True:
        tracer = _Tracer(is_layer, whole)
        try:
            graph = tracer.trace(model, concrete_args=fixed or None)
            break
        except Exception as error:
            if tracer.failed is None:
                raise ValueError(_refusal(model, error)) from error
            whole[tracer.failed] = f"its forward pass cannot be followed: {_first_line(error)}"
    _drop_fixed(graph, len(args))
    graph._tracer_cls = fx.Tracer  # pickling names the class that follows the generated code again
    return fx.GraphModule(model, graph, type(model).__name__), whole


def _refusal(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__}.forward cannot be followed by torch.fx ({type(error).__name__}: "
        f"{_first_line(error)}): it decides by values of tensors, or takes *args. Compact the submodules "
        "that can be followed, each with an example of its own (model.backbone = compact(model.backbone, "
        "features)), or move the decision into a submodule, which is then left whole"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _drop_fixed(graph: fx.Graph, inputs: int) -> None:
    """The graph is made for the default values of the other arguments: it takes the inputs only."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _ASSERTIONS:
            condition = node.args[0]
            graph.erase_node(node)
            if isinstance(condition, fx.Node) and condition.op == "call_function" and not condition.users:
                graph.erase_node(condition)
    for node in [n for n in graph.nodes if n.op == "placeholder"][inputs:]:
        if not node.users:
            graph.erase_node(node)


class Run(fx.Interpreter):
    """One forward pass of a graph, step by step: keeps the shapes and counts FLOPs.

    Args:
        module: the graph.

    Attributes:
        shapes: step -> shape of the tensor that it makes; other results are not in it.
        numbers: step -> the integer that it makes, as sizes are.
        flops: step -> FLOPs (one multiply or one add each) of its matrix products and convolutions.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One step, with its shape and FLOPs noted."""
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        elif isinstance(result, int):
            self.numbers[n] = result
        return result

    def once(self, args: tuple[Any, ...]) -> Any:
        """The outputs; random numbers are drawn from the same state each time and not used up."""
        with torch.no_grad(), _every_product_seen(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.run(*copy.deepcopy(args))


@contextmanager
def _every_product_seen() -> Iterator[None]:
    """The fused inference kernel of attention layers does not tell the counter of its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
