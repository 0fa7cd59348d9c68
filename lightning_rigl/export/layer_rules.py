"""How units pass through layers with a matrix: some are read, others are made."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lightning_rigl.export import weights
from lightning_rigl.export.context import Context, Reading
from lightning_rigl.export.units import UNKNOWN, Units


def layer(a: Context, node: fx.Node) -> Units | None:
    """Linear layers and convolutions."""
    module, name = a.module(node), str(node.target)
    rank = len(a.shapes[node])
    axis = rank - 1 - weights.spatial_dims(module)
    if not a.owns(node):
        return a.leave(node, f"{name} shares its weight with another layer")
    if isinstance(module, weights.TRANSPOSED) and module.groups > 1:
        return a.leave(node, f"{name} is transposed and has groups")
    source = a.tensors(node)[0]
    units = a.units.get(source)
    if units is not None and units.axis != axis:
        a.leave(node, f"{name} reads along another axis")
        units = None
    reading = _reading(a, node, name, units)
    if weights.groups(module) > 1:
        _couple(a, reading, name)
    constant = weights.constant_outputs(module, _values(reading, units))
    return Units(axis, reading.outputs, constant)


def _values(reading: Reading, units: Units | None) -> Tensor:
    """What this call reads; of an input that is not followed nothing is known."""
    module = reading.layer
    count = weights.connected(module).shape[1] * weights.groups(module)
    return torch.full((count,), UNKNOWN, dtype=torch.float64) if units is None else units.values


def _reading(a: Context, node: fx.Node, name: str, units: Units | None) -> Reading:
    """The units that the layer reads and makes; every call of it has the same ones."""
    found = a.readings.get(name)
    if found is None:
        module = a.module(node)
        outputs = a.classes.new(len(weights.connected(module)))
        found = Reading(module, outputs, None if units is None else units.ids, torch.empty(0))
        found.values = _values(found, units)
        a.readings[name] = found
    elif units is None or found.inputs is None:
        for ids in (found.inputs, None if units is None else units.ids):
            if ids is not None:
                a.classes.keep(ids, f"another call of {name} reads what is not followed")
        found.inputs = None
        found.values = torch.full_like(found.values, UNKNOWN)
    else:
        a.classes.join(found.inputs, units.ids)
        found.values = torch.where(found.values == units.values, found.values, UNKNOWN)
    found.calls.append(node)
    return found


def _couple(a: Context, reading: Reading, name: str) -> None:
    """The inputs and outputs of a group stay or go together: groups have one size."""
    if reading.inputs is None:
        a.classes.keep(reading.outputs, f"{name} has groups and its input is not followed")
        return
    groups = weights.groups(reading.layer)
    for inputs, outputs in zip(reading.inputs.chunk(groups), reading.outputs.chunk(groups), strict=True):
        members = torch.cat([inputs, outputs])
        a.classes.join(members[:1].expand(len(members)), members)


def embedding(a: Context, node: fx.Node) -> Units | None:
    """A table of rows: a column that no one reads goes; one of equal numbers is a constant."""
    module = a.module(node)
    if not a.owns(node) or module.max_norm is not None:
        return a.leave(node)
    name = str(node.target)
    if name not in a.columns:
        a.columns[name] = a.classes.new(module.embedding_dim)
    table = module.weight.detach()
    constant = (table == table[:1]).all(0).cpu()
    values = torch.where(constant, table[0].double().cpu(), UNKNOWN)
    return Units.unknown(len(a.shapes[node]) - 1, a.columns[name]).with_values(values)
