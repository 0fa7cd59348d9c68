"""Which units of a traced model no output depends on."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lightning_rigl.export import layer_rules, rulebook, rules, shapes, weights
from lightning_rigl.export.context import Context, Reading
from lightning_rigl.export.rules import Rule
from lightning_rigl.export.trace import Run
from lightning_rigl.export.units import Units

BORDER_SHARE = 8  # correcting the border costs a pass over the output: worth it for 1 input in 8 or more
_OWN_PARAMETERS = (layer_rules.layer, layer_rules.embedding, rules.channelwise)


def follow(graph: fx.GraphModule, run: Run, whole: dict[str, str]) -> tuple[Context, set[fx.Node]]:
    """The units of every step, and the steps that only rearrange or scale the model's inputs.

    Args:
        graph: the traced model, in evaluation mode.
        run: its run on an example.
        whole: modules of the graph that could not be followed, with the reason.
    """
    context, from_input = Context(graph, run, whole), set[fx.Node]()
    for node in graph.graph.nodes:
        rule = _rule(context, node)
        if node not in context.shapes and rule not in rules.NOT_TENSORS:
            rule = None  # several results in one
        if not context.tensors(node) and rule not in rules.OF_NOTHING:
            rule = None
        if not (rule is rules.item and node.args[0] in context.whole_shapes) and rule is not shapes.regrouped:
            context.keep_sizes(node)
        units = context.leave(node) if rule is None else rule(context, node)
        if units is not None:
            context.units[node] = units
        if node.op in ("placeholder", "get_attr") or _rearranges(node, rule, units, from_input):
            from_input.add(node)
        _note_in_place(context, node, units)
    return context, from_input


def _rearranges(node: fx.Node, rule: Rule | None, units: Units | None, from_input: set[fx.Node]) -> bool:
    read = node.all_input_nodes
    if units is not None:
        return False
    return rule not in (None, *_OWN_PARAMETERS) and bool(read) and all(n in from_input for n in read)


def _rule(context: Context, node: fx.Node) -> Rule | None:
    if node.op == "call_module":
        return rulebook.of_module(context.module(node))
    if node.op == "call_function":
        return rulebook.of_function(node.target)
    if node.op == "call_method":
        return rulebook.of_method(str(node.target))
    return {"get_attr": rules.vector, "placeholder": rules.number}.get(node.op)


def _note_in_place(context: Context, node: fx.Node, units: Units | None) -> None:
    """Who reads the input of an in-place step later reads its result."""
    if not rules.in_place(context, node) or not context.tensors(node):
        return
    source = context.tensors(node)[0]
    if units is None:
        context.units.pop(source, None)
    else:
        context.units[source] = units


class Liveness:
    """Which classes of units some output depends on; all others may go.

    A unit lives if the output shows it, or if a living unit reads it through a weight that is not zero,
    unless it is a constant that the bias of its readers can take over. Marking starts at the outputs, so that
    units which only feed each other are found dead. Of a layer without living units one dead unit stays.

    Args:
        context: what `follow` found.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        everything = torch.arange(len(context.classes))
        self._roots = context.classes.roots(everything)
        self._alive = torch.zeros(len(everything), dtype=torch.bool)
        self._alive[list(context.classes.kept())] = True
        self._reads = {
            name: weights.connected(r.layer)
            for name, r in context.readings.items()
            if weights.groups(r.layer) == 1
        }
        self.folds = {name: self._foldable(name) for name in self._reads}
        self._mark()
        made = [r.outputs for r in context.readings.values()] + list(context.columns.values())
        self._stays = self._alive.clone()
        for outputs in made:
            if not self.of(outputs).any():
                self._stays[self._roots[outputs[0]]] = True

    def of(self, ids: Tensor) -> Tensor:
        """Whether each unit stays: bool."""
        return self._stays[self._roots[ids]]

    def read(self, name: str) -> Tensor:
        """The inputs of a layer that a living unit of it reads and no bias can take over: bool."""
        rows = self._alive[self._roots[self.context.readings[name].outputs]]
        return self._reads[name][rows].any(0) & ~self.folds[name]

    def _mark(self) -> None:
        before = -1
        while before != (before := int(self._alive.sum())):
            for name in reversed(self._reads):
                inputs = self.context.readings[name].inputs
                if inputs is not None:
                    self._alive[self._roots[inputs[self.read(name)]]] = True

    def _foldable(self, name: str) -> Tensor:
        reading = self.context.readings[name]
        simple = weights.foldable(reading.layer, reading.values)
        at_border = ~reading.values.isnan() & ~simple & self._reads[name].any(0)
        if _batched_conv(self.context, reading) and at_border.sum() * BORDER_SHARE >= len(at_border):
            return simple | at_border
        return simple


def _batched_conv(context: Context, reading: Reading) -> bool:
    dims = weights.spatial_dims(reading.layer) + 2
    return isinstance(reading.layer, weights.CONVS) and all(
        len(context.shapes[n]) == dims for n in reading.calls
    )
