"""What the rules know of a graph while they walk through it, and what they note down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lightning_rigl.export.trace import Run
from lightning_rigl.export.units import Classes, Units
from lightning_rigl.export.weights import Layer


@dataclass
class Reading:
    """A layer with a matrix, the units that it reads and those that it makes.

    Args:
        layer: the module.
        outputs: numbers of its output units.
        inputs: numbers of its input units; None: its input is not followed.
        values: float64, the constants among its inputs, the same in every call; NaN: unknown.
        calls: the steps that call it.
    """

    layer: Layer
    outputs: Tensor
    inputs: Tensor | None
    values: Tensor
    calls: list[fx.Node] = field(default_factory=list)


class Context:
    """The units of every step of a graph.

    Args:
        graph: the traced model, in evaluation mode.
        run: its run on an example.
        whole: modules of the graph that could not be followed, with the reason.

    Attributes:
        units: step -> the units of its result; a step that is not in it is not followed.
        readings: layers with a matrix, by name.
        channels: modules with parameters per channel -> numbers of the channels.
        columns: embeddings -> numbers of their columns.
        vectors: tensors that the forward pass names itself -> their units.
        sizes: steps that give the number of some units.
        whole_shapes: steps that give the shape of another.
        written_sizes: reshapes that name a number of units, and the units.
        left: modules that are read or left as a whole, with the reason.
    """

    def __init__(self, graph: fx.GraphModule, run: Run, whole: Mapping[str, str]) -> None:
        self.graph, self.shapes, self.numbers = graph, run.shapes, run.numbers
        self.modules = dict(graph.named_modules())
        self.classes = Classes()
        self.units: dict[fx.Node, Units] = {}
        self.readings: dict[str, Reading] = {}
        self.channels: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.vectors: dict[str, Units] = {}
        self.sizes: dict[fx.Node, Units] = {}
        self.whole_shapes: dict[fx.Node, fx.Node] = {}
        self.written_sizes: dict[fx.Node, Units] = {}
        self.left: dict[str, str] = {}
        self._whole = whole
        self._owners = _owners(graph, self.modules)

    def module(self, node: fx.Node) -> Any:
        """The module that a step calls."""
        return self.modules[str(node.target)]

    def target(self, node: fx.Node) -> Any:
        """What a step runs: a function, the name of a method, or the class of a module."""
        return type(self.module(node)) if node.op == "call_module" else node.target

    def words(self, node: fx.Node) -> str:
        """A step as an error or report names it."""
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return f"{node.target} ({type(self.module(node)).__name__})"
        return str(getattr(node.target, "__name__", node.target))

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The steps whose results are tensors and that this one reads, each once."""
        return [n for n in node.all_input_nodes if n in self.shapes]

    def argument(self, node: fx.Node, position: int, name: str, default: Any) -> Any:
        """An argument of a step, by position or by name."""
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    def owns(self, node: fx.Node) -> bool:
        """Whether no other module or step of the graph has a parameter of this one."""
        tensors = self.module(node).parameters() if node.op == "call_module" else [self.tensor(node)]
        return all(self._owners[id(t)] == {str(node.target)} for t in tensors)

    def tensor(self, node: fx.Node) -> Any:
        """The attribute that a ``get_attr`` step reads."""
        return _attribute(self.graph, str(node.target))

    def keep_sizes(self, node: fx.Node) -> None:
        """Keep the units whose number this step reads."""
        for source in node.all_input_nodes:
            origin = self.whole_shapes.get(source)
            units = self.sizes.get(source) or (None if origin is None else self.units.get(origin))
            if units is not None:
                self.classes.keep(units.ids, f"their number is read by {self.words(node)}")

    def leave(self, node: fx.Node, why: str | None = None) -> Units | None:
        """Keep everything that a step reads, and follow its result no further: None, as a rule gives it."""
        self.keep_sizes(node)
        for source in node.all_input_nodes:
            if (units := self.units.get(source)) is not None:
                self.classes.keep(units.ids, why or f"read whole by {self.words(node)}")
        if node.op == "call_module" and next(self.module(node).parameters(), None) is not None:
            name = str(node.target)
            self.left[name] = self._whole.get(name, why or f"{type(self.module(node)).__name__} stays whole")
        return None

    def do(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a step on other arguments; None if it does not run on them."""
        try:
            if node.op == "call_module":
                return self.module(node)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever it is: nothing is learnt of the step, and it is left whole
            return None


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _owners(graph: fx.GraphModule, modules: Mapping[str, nn.Module]) -> dict[int, set[str]]:
    """Identity of a parameter -> the modules and steps of the graph that have it."""
    owners: dict[int, set[str]] = {}
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            tensors = list(modules[name].parameters())
        elif node.op == "get_attr":
            tensors = [_attribute(graph, name)]
        else:
            continue
        for tensor in tensors:
            owners.setdefault(id(tensor), set()).add(name)
    return owners
