"""What compacting a model has removed, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from lightning_rigl.export.trace import Run
from lightning_rigl.topology.tables import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Cost:
    """A layer's weight and what it costs: parameters, and FLOPs of one pass over the example.

    FLOPs are counted by ``torch.utils.flop_counter``, which does not see fused attention on the CPU.
    """

    shape: tuple[int, ...]
    parameters: int
    flops: int

    @classmethod
    def none(cls) -> Cost:
        """Of a layer that is not there."""
        return cls((), 0, 0)


@dataclass(frozen=True)
class CompactReport:
    """What `compact` has removed.

    Args:
        before: layer -> its cost in the model, zeros included.
        after: layer -> its cost in the compacted model.
        left: layers whose outputs stay whole, or that are left as they are -> the reason.
        kept_inputs: layer that reads the model's input -> the features that it reads, where not all.
        error: largest difference of the outputs on the example.

    Example:
        >>> before = {"fc": Cost((300, 784), 235500, 470400)}
        >>> after = {"fc": Cost((100, 408), 40900, 81600)}
        >>> print(CompactReport(before, after, {}, {}, 0.0))
        compacted: parameters and FLOPs of one pass over the example, dense
        layer      shape  compacted         parameters              FLOPs
        fc     300 x 784  100 x 408  40,900 of 235,500  81,600 of 470,400
        -----------------------------------------------------------------
        total                        40,900 of 235,500  81,600 of 470,400
    """

    before: Mapping[str, Cost]
    after: Mapping[str, Cost]
    left: Mapping[str, str]
    kept_inputs: Mapping[str, Tensor]
    error: float

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of parameters before and after."""
        return sum(c.parameters for c in self.before.values()), sum(c.parameters for c in self.after.values())

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of one pass over the example before and after; one multiply or one add is one FLOP."""
        return sum(c.flops for c in self.before.values()), sum(c.flops for c in self.after.values())

    def table(self) -> Table:
        """One row per layer, and their sum; what was left whole stands in the title, with the reason."""
        rows = []
        for name in dict.fromkeys([*self.before, *self.after]):
            old, new = (costs.get(name, Cost.none()) for costs in (self.before, self.after))
            shapes = (" x ".join(map(str, cost.shape)) for cost in (old, new))
            rows.append((name, *shapes, _of(new.parameters, old.parameters), _of(new.flops, old.flops)))
        total = ("total", "", "", *(_of(after, before) for before, after in (self.parameters, self.flops)))
        title = ["compacted: parameters and FLOPs of one pass over the example, dense"]
        title += [f"{name} keeps its units: {why}" for name, why in self.left.items()]
        columns = ("layer", "shape", "compacted", "parameters", "FLOPs")
        return Table("\n".join(title), columns, tuple(rows), total)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> RichTable:
        return self.table().__rich__()


def costs(graph: fx.GraphModule, run: Run) -> dict[str, Cost]:
    """The cost of each step that has parameters, and of all others together.

    Args:
        graph: a traced model.
        run: its run on the example.
    """
    modules, found, seen = dict(graph.named_modules()), dict[str, Cost](), set[int]()
    other = 0
    for node in graph.graph.nodes:
        name, flops = str(node.target), run.flops.get(node, 0)
        if node.op == "call_module" and (own := list(modules[name].parameters())):
            before = found.get(name, Cost(_shape(modules[name]), 0, 0))
        elif node.op == "get_attr" and isinstance(tensor := _tensor(graph, name), nn.Parameter):
            own, before = [tensor], found.get(name, Cost(tuple(tensor.shape), 0, 0))
        else:
            other += flops
            continue
        new = sum(p.numel() for p in own if id(p) not in seen)
        seen |= {id(p) for p in own}
        found[name] = Cost(before.shape, before.parameters + new, before.flops + flops)
    return found if not other else {**found, "(no parameter)": Cost((), 0, other)}


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _tensor(graph: fx.GraphModule, path: str) -> object:
    home, _, name = path.rpartition(".")
    return getattr(graph.get_submodule(home), name)


def _of(after: int, before: int) -> str:
    return f"{after:,} of {before:,}"
