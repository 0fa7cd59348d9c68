"""How units pass through the steps of a graph that hold no matrix: which axis, which number, which value.

A rule takes the analysis and a step and gives the `Units` of its result; None where it follows no units. What
has no rule here is not understood: everything it reads is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from lightning_rigl.export import shapes
from lightning_rigl.export.context import Context
from lightning_rigl.export.units import UNKNOWN, Units

Rule: TypeAlias = Callable[[Context, fx.Node], Units | None]

POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
IDLE_MODULES = (  # in evaluation mode
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
)
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
POINTWISE_NAMES = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh"),
    *("hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanhshrink"),
    *("abs", "neg", "exp", "expm1", "log1p", "sqrt", "rsqrt", "square", "sin", "cos", "erf", "clamp", "clip"),
    *("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "multiply", "subtract"),
    *("clone", "detach", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as"),
    *("expand_as",),
)
_SWITCHED = ("relu", "relu6", "silu", "mish", "selu", "elu", "celu", "leaky_relu", "hardtanh", "hardswish")
OPERATORS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")


def pointwise(a: Context, node: fx.Node) -> Units | None:
    """Each coordinate of the result depends on the same coordinate of the inputs, and on numbers."""
    rank, inputs = len(a.shapes[node]), a.tensors(node)
    tracked = {n: u for n in inputs if (u := a.units.get(n)) is not None}
    places = {u.axis + rank - len(a.shapes[n]) for n, u in tracked.items()}
    if not places:
        return None
    axis = places.pop()
    size = a.shapes[node][axis]
    wide = {n: u for n, u in tracked.items() if len(u.ids) == size}
    for n in tracked.keys() - wide.keys():
        a.classes.keep(tracked[n].ids, f"one unit is spread over the others by {a.words(node)}")
    strangers = [n for n in inputs if n not in tracked and _size(a.shapes[n], axis - rank) not in (1, None)]
    if places or not wide or (strangers and size > 1):
        return a.leave(node, f"meets a tensor that is not followed, in {a.words(node)}")
    first, *others = wide.values()
    for other in others:
        a.classes.join(first.ids, other.ids)
    return Units.unknown(axis, first.ids).with_values(_values(a, node, wide))


def _size(shape: tuple[int, ...], place: int) -> int | None:
    """The size at a place counted from the end; None where the shape is too short."""
    return shape[place] if len(shape) >= -place else None


def _values(a: Context, node: fx.Node, wide: dict[fx.Node, Units]) -> Tensor:
    """The step itself, done on the constant values; in float64, NaN standing for the unknown."""
    values = [u.values for u in wide.values()]
    unknown = torch.full_like(values[0], UNKNOWN)

    def put(n: fx.Node) -> Tensor:
        return wide[n].values.clone()

    product = a.target(node) in _PRODUCTS
    zero = torch.stack([v == 0 for v in values]).any(0) if product else torch.zeros_like(unknown).bool()
    known = ~torch.stack(values).isnan().any(0)
    if len(wide) < len(node.all_input_nodes) or not known.any():
        return torch.where(zero, 0.0, unknown)
    done = a.do(node, fx.node.map_arg(node.args, put), fx.node.map_arg(node.kwargs, put))
    if not isinstance(done, Tensor) or done.shape != unknown.shape:
        return torch.where(zero, 0.0, unknown)
    return torch.where(zero, 0.0, torch.where(known, done.double().cpu(), UNKNOWN))


def same(a: Context, node: fx.Node) -> Units | None:
    """A step that changes nothing in evaluation mode, or only dtype and memory layout."""
    return a.units.get(a.tensors(node)[0])


def dropout(a: Context, node: fx.Node) -> Units | None:
    """Dropout does nothing, unless the function is told to go on in evaluation mode."""
    training = a.argument(node, 2, "training", True)
    return same(a, node) if training is False else a.leave(node, f"{a.words(node)} draws random numbers")


def channelwise(a: Context, node: fx.Node) -> Units | None:
    """Batch norm and PReLU: parameters of their own for each channel."""
    source, module = a.tensors(node)[0], a.module(node)
    units = a.units.get(source)
    single = isinstance(module, nn.PReLU) and module.num_parameters == 1
    if units is None:
        return a.leave(node, f"the input of {a.words(node)} is not followed")
    if units.axis != 1 and not single:
        return a.leave(node, f"the channels of {a.words(node)} lie along another axis")
    if not single and not a.owns(node):
        return a.leave(node, f"{a.words(node)} shares its parameters with another layer")
    if not single:
        _own_channels(a, str(node.target), units)
    if isinstance(module, nn.PReLU):
        slope = module.weight.detach().double().cpu()
        return units.with_values(torch.where(units.values < 0, slope * units.values, units.values))
    return units.with_values(_normalised(module, units.values))


def _own_channels(a: Context, name: str, units: Units) -> None:
    """Every call of a module has the same channels."""
    a.classes.join(a.channels.setdefault(name, units.ids), units.ids)


def _normalised(module: Any, values: Tensor) -> Tensor:
    """Batch norm in evaluation mode, of a constant; its result is constant too where its factor is zero."""
    factor = torch.ones_like(values) if module.weight is None else module.weight.detach().double().cpu()
    shift = torch.zeros_like(values) if module.bias is None else module.bias.detach().double().cpu()
    if module.running_mean is None:  # it takes the statistics of the batch
        return torch.where(factor == 0, shift, UNKNOWN)
    mean, variance = module.running_mean.double().cpu(), module.running_var.double().cpu()
    result = (values - mean) / (variance + module.eps).sqrt() * factor + shift
    return torch.where(factor == 0, shift, result)


def size(a: Context, node: fx.Node) -> Units | None:
    """``x.shape``, ``x.size()`` and ``x.size(i)``: numbers; those along units are remembered."""
    source = a.tensors(node)[0]
    place = a.argument(node, 1, "dim", None)
    if a.target(node) == "size" and isinstance(place, int):
        _remember(a, node, source, place)
    else:
        a.whole_shapes[node] = source
    return None


def _remember(a: Context, node: fx.Node, source: fx.Node, place: int) -> None:
    units = a.units.get(source)
    if units is not None and place % len(a.shapes[source]) == units.axis:
        a.sizes[node] = units


def item(a: Context, node: fx.Node) -> Units | None:
    """``x.shape[i]``, or a slice of a tensor."""
    source, index = node.args
    if not isinstance(source, fx.Node) or source not in a.whole_shapes:
        places = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (int, slice, type(None), type(...))) for i in places)
        return shapes.moved(a, node) if plain and a.tensors(node) else a.leave(node)
    if isinstance(index, int):
        _remember(a, node, a.whole_shapes[source], index)
        return None
    return a.leave(node)


def attribute(a: Context, node: fx.Node) -> Units | None:
    """``getattr(x, name)``: its shape, or something that does not depend on it."""
    if node.args[1] == "shape":
        a.whole_shapes[node] = a.tensors(node)[0]
        return None
    return None if node.args[1] in ("device", "dtype", "ndim") else a.leave(node)


def number(a: Context, node: fx.Node) -> Units | None:
    """``x.dim()`` and the like, which depend on no size; and inputs, which are not followed."""
    return None


def vector(a: Context, node: fx.Node) -> Units | None:
    """A tensor of the model itself with one axis, as the factors of a layer scale: its values are known."""
    tensor = a.tensor(node)
    wide = [i for i, n in enumerate(tensor.shape) if n > 1] if isinstance(tensor, Tensor) else []
    if len(wide) != 1 or not tensor.is_floating_point() or not a.owns(node):
        return None
    name = str(node.target)
    if name not in a.vectors:
        units = Units.unknown(wide[0], a.classes.new(tensor.shape[wide[0]]))
        a.vectors[name] = units.with_values(tensor.detach().flatten().cpu())
    return a.vectors[name]


def in_place(a: Context, node: fx.Node) -> bool:
    """Whether a step writes its result into its first input."""
    if node.op == "call_module":
        return bool(getattr(a.module(node), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = str(getattr(node.target, "__name__", ""))
    asked = [node.kwargs.get("inplace"), *(node.args[1:] if name in _SWITCHED else ())]
    return node.target in IN_PLACE or name.endswith("_") or any(value is True for value in asked)


NOT_TENSORS = (size, item, attribute, number)  # rules of steps whose results may be numbers or shapes
OF_NOTHING = (item, number, vector)  # rules of steps that may read no tensor
