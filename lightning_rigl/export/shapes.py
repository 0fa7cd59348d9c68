"""How units pass through steps that move, merge, pool or join axes.

Where an axis goes is not derived from the arguments of each operator but seen: the step is run on a tensor
that holds, everywhere, the number of its coordinate along the axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rigl.export.context import Context
from lightning_rigl.export.units import UNKNOWN, Units

POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
POOL_NAMES = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate"),
)


def moved(a: Context, node: fx.Node) -> Units | None:
    """The axis changes its place and keeps its length: permute, squeeze, a slice of other axes, a mean."""
    units, seen = a.units.get(a.tensors(node)[0]), _seen(a, node)
    if units is None or seen is None or not torch.equal(seen[1], torch.arange(len(units.ids))):
        return a.leave(node)
    return units.at(seen[0])


def regrouped(a: Context, node: fx.Node) -> Units | None:
    """The axis may be merged with others; a size written as a number follows the units."""
    source = a.tensors(node)[0]
    units, seen = a.units.get(source), _seen(a, node)
    if units is None or seen is None:
        return a.leave(node)
    axis, places = seen
    result = Units(axis, units.ids[places], units.values[places])
    return result if a.target(node) in FLATTENING else _resized(a, node, result)


FLATTENING = (torch.flatten, "flatten", nn.Flatten)


def _resized(a: Context, node: fx.Node, result: Units) -> Units | None:
    """See to the size that ``view`` or ``reshape`` asks for along the axis of the units."""
    first = node.args[1] if len(node.args) > 1 else ()
    sizes = tuple(first) if isinstance(first, (tuple, list)) else node.args[1:]
    if node.kwargs or len(sizes) != len(a.shapes[node]):
        return a.leave(node)
    for place, size in enumerate(sizes):
        if isinstance(size, fx.Node) and (owner := a.sizes.get(size)) is not None:
            if place != result.axis or len(owner.ids) != len(result.ids):
                return a.leave(node)
            a.classes.join(result.ids, owner.ids)
        elif isinstance(size, fx.Node) and place == result.axis:
            return a.leave(node)  # a size computed from we do not know what
        elif place == result.axis and size != -1:
            a.written_sizes[node] = result
    return result


def pooled(a: Context, node: fx.Node) -> Units | None:
    """Pooling, resizing and padding of the axes behind the channels."""
    source = a.tensors(node)[0]
    units, before = a.units.get(source), a.shapes[source]
    if units is None or len(before) != len(a.shapes[node]) or units.axis >= len(before) - _spatial(a, node):
        return a.leave(node)
    seen = _seen(a, node)
    if seen is not None and seen[0] == units.axis:  # a channel of one value keeps it
        return units
    return units.with_values(torch.where(units.values == 0, 0.0, UNKNOWN))  # zeros come in at the border


def _spatial(a: Context, node: fx.Node) -> int:
    """The number of axes that a pooling works on, which its name ends with."""
    target = a.target(node)
    digit = str(target if isinstance(target, str) else target.__name__)[-2:-1]
    return int(digit) if digit.isdigit() else len(a.shapes[node]) - 2


def concatenated(a: Context, node: fx.Node) -> Units | None:
    """``cat``: behind each other along the axis of the units, or beside each other along another one."""
    parts: list[fx.Node] = a.tensors(node)
    along = a.argument(node, 1, "dim", 0)
    rank = len(a.shapes[node])
    listed = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(listed, (list, tuple)) or not isinstance(along, int) or len(listed) != len(parts):
        return a.leave(node)
    tracked = [u for n in parts if (u := a.units.get(n)) is not None]
    axes = {u.axis for u in tracked}
    if len(axes) != 1:
        return a.leave(node)
    axis = axes.pop()
    if along % rank == axis:
        return _behind(a, node, parts, axis)
    if len(tracked) != len(parts):
        return a.leave(node)
    for other in tracked[1:]:
        a.classes.join(tracked[0].ids, other.ids)
    values = torch.stack([u.values for u in tracked])
    return tracked[0].with_values(torch.where((values == values[0]).all(0), values[0], UNKNOWN))


def _behind(a: Context, node: fx.Node, parts: list[fx.Node], axis: int) -> Units:
    pieces = []
    for part in parts:
        units = a.units.get(part)
        if units is None:
            units = Units.unknown(axis, a.classes.new(a.shapes[part][axis]))
            a.classes.keep(units.ids, f"a part of {a.words(node)} that is not followed")
        pieces.append(units)
    return Units(axis, torch.cat([u.ids for u in pieces]), torch.cat([u.values for u in pieces]))


def _seen(a: Context, node: fx.Node) -> tuple[int, Tensor] | None:
    """The axis of the result and, along it, the coordinates of the source; None where it is no one axis."""
    source = a.tensors(node)[0]
    units = a.units.get(source)
    if units is None or len(units.ids) < 2:
        return None
    view = [-1 if i == units.axis else 1 for i in range(len(a.shapes[source]))]
    probe = torch.arange(len(units.ids), dtype=torch.float64).view(view).expand(a.shapes[source]).contiguous()

    def put(n: fx.Node) -> Any:
        return probe if n is source else a.numbers.get(n)

    result = a.do(node, fx.node.map_arg(node.args, put), fx.node.map_arg(node.kwargs, put))
    if not isinstance(result, Tensor) or result.shape != a.shapes[node] or not result.numel():
        return None
    return _line(result)


def _line(result: Tensor) -> tuple[int, Tensor] | None:
    for axis in range(result.dim()):
        line = result.movedim(axis, -1).reshape(-1, result.shape[axis])[0]
        shape = [-1 if i == axis else 1 for i in range(result.dim())]
        if bool((line != line[0]).any()) and torch.equal(line.view(shape).expand_as(result), result):
            return axis, line.round().long()
    return None
