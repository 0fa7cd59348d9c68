"""The layers of a traced model cut down to their living units, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rigl.export import weights
from lightning_rigl.export.context import Context, Reading
from lightning_rigl.export.dead_units import Liveness
from lightning_rigl.export.parts import ConstantChannels, Select

COPY_COST = 16  # multiply-adds that take as long as copying one feature, generously


def shrink(
    context: Context, alive: Liveness, from_input: set[fx.Node], select: bool = True
) -> dict[str, Tensor]:
    """Cut every layer of the graph to its living units.

    Args:
        context: what is known of the graph; its modules are changed.
        alive: which units live.
        from_input: steps that only rearrange or scale the model's inputs: features of these that no one reads
            are always left out.
        select: whether a layer may get a `Select` in front of it.

    Returns:
        Layer -> the features of the model's input that it reads, where it does not read all.
    """
    kept_inputs = {}
    for name, reading in context.readings.items():
        if weights.groups(reading.layer) > 1:
            _cut_groups(reading, alive)
            continue
        at_input = all(source_of(call) in from_input for call in reading.calls)
        chosen = _cut_layer(context, name, alive, at_input, select)
        if at_input and chosen is not None:
            kept_inputs[name] = chosen
    for name, ids in context.channels.items():
        _cut_channels(context.modules[name], alive.of(ids))
    for name, ids in context.columns.items():
        _cut_columns(context.modules[name], alive.of(ids))
    for name, units in context.vectors.items():
        _cut_vector(context.graph, name, units.axis, alive.of(units.ids))
    for node, units in context.written_sizes.items():
        _write_size(node, units.axis, int(alive.of(units.ids).sum()))
    context.graph.graph.lint()
    context.graph.recompile()
    return kept_inputs


def _cut_layer(
    context: Context, name: str, alive: Liveness, at_input: bool, may_select: bool
) -> Tensor | None:
    """A layer of one group; the features that it selects from its input, None if it takes all."""
    reading = context.readings[name]
    rows, read = alive.of(reading.outputs), alive.read(name)
    there = torch.ones_like(read) if reading.inputs is None else alive.of(reading.inputs)
    if not read.any():
        read[there.nonzero()[0]] = True  # a layer of no inputs would be no layer
    dropped = int((there & ~read).sum())
    pays = dropped * int(rows.sum()) * weights.matrix(reading.layer).shape[2] >= COPY_COST * int(read.sum())
    select = may_select and dropped > 0 and (at_input or pays)
    columns = read if select else there
    _fold(context, name, reading, rows, ~columns & alive.folds[name] & ~reading.values.isnan())
    _cut(reading.layer, rows, columns)
    if not select:
        return None
    kept = columns[there].nonzero().flatten()
    part = Select(kept.to(reading.layer.weight.device), -1 - weights.spatial_dims(reading.layer))
    context.graph.add_submodule(f"{name}_inputs", part)
    for call in reading.calls:
        source = source_of(call)
        with context.graph.graph.inserting_before(call):
            step = context.graph.graph.call_module(f"{name}_inputs", (source,))
        call.replace_input_with(source, step)
    return kept


def _fold(context: Context, name: str, reading: Reading, rows: Tensor, gone: Tensor) -> None:
    """Give the bias what constant inputs that go have added; at a padded border that is no single number."""
    layer = reading.layer
    everywhere = gone & weights.foldable(layer, reading.values)
    added = weights.folded(layer, reading.values, everywhere)
    if added.any():
        old = torch.zeros(len(added)).double() if layer.bias is None else layer.bias.detach().double().cpu()
        layer.bias = _parameter(old + added, layer.weight)
    if (gone & ~everywhere).any():
        _add_constant_channels(context, name, reading, rows, gone & ~everywhere)


def _add_constant_channels(context: Context, name: str, reading: Reading, rows: Tensor, gone: Tensor) -> None:
    layer: Any = reading.layer
    columns = layer.weight.detach()[:, gone.to(layer.weight.device)].double()
    values = reading.values[gone].to(columns.device)
    kernel = torch.einsum("oi...,i->o...", columns, values).unsqueeze(1)
    convolution = type_of(layer)(
        1,
        len(rows),
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=False,
        device="meta",  # draws no random numbers
    )
    convolution.weight = _parameter(kernel, layer.weight)
    _cut(convolution, rows, torch.ones(1, dtype=torch.bool))
    part = ConstantChannels(convolution).eval()
    context.graph.add_submodule(f"{name}_constants", part)
    for call in reading.calls:
        with context.graph.graph.inserting_after(call):
            step = context.graph.graph.call_module(f"{name}_constants", (call, source_of(call)))
        call.replace_all_uses_with(step)
        step.args = (call, *step.args[1:])  # its own input was replaced as well


def source_of(call: fx.Node) -> fx.Node:
    """The step whose result a layer reads."""
    return call.all_input_nodes[0]


def type_of(layer: weights.Layer) -> Any:
    """The class in ``torch.nn`` of a layer that may be of a subclass."""
    return next(kind for kind in weights.LAYERS if isinstance(layer, kind))


def _cut(layer: Any, rows: Tensor, columns: Tensor) -> None:
    weight = layer.weight.detach()
    transposed = isinstance(layer, weights.TRANSPOSED)
    first, second = (columns, rows) if transposed else (rows, columns)
    device = weight.device
    layer.weight = _parameter(weight[first.to(device)][:, second.to(device)], layer.weight)
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias.detach()[rows.to(device)], layer.bias)
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = int(columns.sum()), int(rows.sum())
    else:
        layer.in_channels, layer.out_channels = int(columns.sum()), int(rows.sum())


def _cut_groups(reading: Reading, alive: Liveness) -> None:
    """Whole groups go; what is left has as many inputs and outputs per group as before."""
    layer: Any = reading.layer
    rows = alive.of(reading.outputs)
    per_group = len(rows) // layer.groups
    inputs = layer.in_channels // layer.groups
    _cut(layer, rows, torch.ones(inputs, dtype=torch.bool))
    layer.groups = int(rows.sum()) // per_group
    layer.in_channels = layer.groups * inputs


def _cut_channels(module: Any, alive: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, _parameter(tensor.detach()[alive.to(tensor.device)], tensor))
        elif tensor is not None:
            setattr(module, name, tensor[alive.to(tensor.device)])
    attribute = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(module, attribute, int(alive.sum()))


def _cut_columns(module: Any, alive: Tensor) -> None:
    module.weight = _parameter(module.weight.detach()[:, alive.to(module.weight.device)], module.weight)
    module.embedding_dim = int(alive.sum())


def _cut_vector(graph: fx.GraphModule, path: str, axis: int, alive: Tensor) -> None:
    home, _, name = path.rpartition(".")
    owner = graph.get_submodule(home)
    tensor = getattr(owner, name)
    cut = tensor.detach().index_select(axis, alive.nonzero().flatten().to(tensor.device))
    setattr(owner, name, _parameter(cut, tensor) if isinstance(tensor, nn.Parameter) else cut)


def _write_size(node: fx.Node, axis: int, size: int) -> None:
    if isinstance(node.args[1], (tuple, list)):
        sizes = tuple(node.args[1])
        node.args = (node.args[0], (*sizes[:axis], size, *sizes[axis + 1 :]))
    else:
        node.args = (*node.args[: axis + 1], size, *node.args[axis + 2 :])


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the same dtype, device and ``requires_grad`` as another one."""
    cut = values.to(dtype=like.dtype, device=like.device).contiguous()
    return nn.Parameter(cut, requires_grad=like.requires_grad)
