"""What the networks of the paper cost, measured; the quirks of the paper's own counter are data.

These are output sizes that replace measured ones, and densities in place of the counts of a mask. All
counting is the package's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial

import torch
from torch import nn

from lightning_rigl import ER, ERK, Uniform
from lightning_rigl.flops.costs import Convention, CostTable
from lightning_rigl.flops.formulas import forward_cost
from lightning_rigl.flops.measure import measure
from paper_networks import CharLM, MobileNetV1, MobileNetV2, ResNet50, WideResNet22x2, lenet

Shapes = Mapping[str, tuple[int, ...]]
Densities = dict[str, Fraction]
Forward = Callable[[float], int]  # sparsity -> f_S


def official_table(
    table: CostTable, positions: Mapping[str, int], outputs: Mapping[str, int] | None = None
) -> CostTable:
    """The table as the counter behind the published numbers sees it.

    Args:
        table: the measured cost.
        positions: parameter name -> output positions (height times width) to take instead of the true ones.
        outputs: parameter name -> output elements to take instead of channels times positions.

    Raises:
        KeyError: a name that is not in the table.
    """
    layers = {layer.key: layer for layer in table.layers}
    for name, number in positions.items():
        layer, outs = layers[name], layers[name].shape[0] * number
        layers[name] = replace(layer, forward=layer.forward * outs // layer.outputs, outputs=outs)
    for name, number in (outputs or {}).items():
        layers[name] = replace(layers[name], outputs=number)
    return replace(table, layers=tuple(layers.values()))


def density_cost(
    table: CostTable, densities: Mapping[str, Fraction], convention: Convention = "official"
) -> int:
    """f_S at real densities; what is not named is dense.

    The official counter multiplies by densities and not by the counts of a mask, so that a layer may have a
    fraction of a connection.
    """
    counts = {layer.name: densities.get(layer.name, 1) * layer.numel for layer in table.layers}
    return forward_cost(table, counts, convention)


def uniform_densities(shapes: Shapes, sparsity: float, dense: Container[str]) -> Densities:
    """1 - S for every layer but those that stay dense."""
    return {name: 1 - Fraction(sparsity) for name in shapes if name not in dense}


def erk_densities(
    shapes: Shapes, sparsity: float, dense: Container[str], zeros: Callable[[float], int] = math.ceil
) -> Densities:
    """ERK in real numbers.

    Args:
        shapes: of the network at width 1; a wider one takes over its densities.
        sparsity: of the pool.
        dense: layers that stay dense, outside the pool.
        zeros: how the zeros of each layer were rounded to a budget: up, when the notebooks were run; down,
            from October 2020 on.
    """
    pool = {name: shape for name, shape in shapes.items() if name not in dense}
    sizes = {name: math.prod(shape) for name, shape in pool.items()}
    counts = ERK().counts(pool, sparsity)
    free = [name for name in pool if counts[name] < sizes[name]]
    budget = sum(size - zeros(sparsity * size) for size in sizes.values())
    budget -= sum(size for name, size in sizes.items() if name not in free)
    eps = Fraction(budget, sum(sum(pool[name]) for name in free))
    return {name: eps * sum(pool[name]) / sizes[name] for name in free}


def of_masks(
    table: CostTable, convention: Convention, dense: Container[str] = (), dense_first: bool = True
) -> dict[str, Forward]:
    """The forward cost at the counts of real masks, by distribution.

    Args:
        table: the measured cost.
        convention: see `forward_cost`.
        dense: layers outside the pool.
        dense_first: leave the first layer dense in the uniform distribution, and in ERK*.
    """
    shapes = {layer.name: layer.shape for layer in table.layers if layer.name not in dense}
    first = f"^{re.escape(next(iter(shapes)))}$"
    parts = {"": Uniform(dense_first), " (ER)": ER(), " (ERK)": ERK(), " (ERK*)": ERK(fixed={first: 0.0})}

    def forward(sparsity: float, name: str) -> int:
        return forward_cost(table, parts[name].counts(shapes, sparsity), convention)

    return {name: partial(forward, name=name) for name in parts}


def on_meta(build: Callable[[], nn.Module], *size: int, dtype: torch.dtype | None = None) -> CostTable:
    """The measured cost of a network that is never given values."""
    with torch.device("meta"):
        return measure(build(), torch.zeros(size, dtype=dtype))


@cache
def resnet50_table(width: float = 1.0) -> CostTable:
    """The official counter takes the first output for 115 x 115; it is 112 x 112."""
    table = on_meta(lambda: ResNet50(width), 1, 3, 224, 224)
    return official_table(table, positions={"conv1.weight": 115**2})


@cache
def mobilenet_v1_table(width: float = 1.0) -> CostTable:
    """The official counter pads stride 2 twice, and sees one channel in the output of a depthwise layer."""
    sides = (112, 57, 56, 29, 28, 15, 14, 14, 14, 14, 14, 8, 7)  # of the second: 56, 28, 14 and 7
    depthwise = {f"dw.{i}.0.weight": side**2 for i, side in enumerate(sides)}
    table = on_meta(lambda: MobileNetV1(width), 1, 3, 224, 224)
    return official_table(table, positions={"conv1.0.weight": 113**2, **depthwise}, outputs=depthwise)


def mobilenet_v2_table() -> CostTable:
    """As measured."""
    return on_meta(MobileNetV2, 1, 3, 224, 224)


@cache
def wrn22x2_table(width: float = 1.0) -> CostTable:
    """As measured, on the images of CIFAR-10."""
    return on_meta(lambda: WideResNet22x2(width), 1, 3, 32, 32)


def char_lm_table() -> CostTable:
    """As measured, per character."""
    return on_meta(CharLM, 1, 1, dtype=torch.long)


def lenet_forward(names: Iterable[str]) -> dict[str, Forward]:
    """The cost of networks of two hidden layers, all layers equally sparse, by names like ``784-300-100``."""

    def forward(sparsity: float, name: str) -> int:
        widths = [int(width) for width in name.split(" ")[0].split("-")]
        table = on_meta(lambda: lenet(widths), 1, widths[0])
        return forward_cost(table, {x.name: (1 - Fraction(sparsity)) * x.numel for x in table.layers})

    return {name: partial(forward, name=name) for name in names}


def mobilenet_v1_forward() -> dict[str, Forward]:
    """The forward cost, for every way the authors' notebook counts MobileNet-v1."""
    table, first, classifier = mobilenet_v1_table(), "conv1.0.weight", "fc.weight"
    shapes = {layer.name: layer.shape for layer in table.layers}
    shapes[classifier] += (1, 1)  # a 1 x 1 convolution there
    depthwise = {name for name in shapes if name.startswith("dw.")}
    small = {0.75: 0.47, 0.85: 0.353, 0.9: 0.285, 0.95: 0.204}
    big = {0.75: 1.98, 0.85: 2.52, 0.9: 3.0, 0.95: 3.98}
    eighty = uniform_densities({classifier: ()}, 0.8, dense=())
    every_way: dict[str, Callable[[float], tuple[CostTable, Densities]]] = {
        "dense": lambda s: (table, {}),
        "uniform, depthwise dense": lambda s: (table, uniform_densities(shapes, s, {first, *depthwise})),
        "uniform, depthwise sparse": lambda s: (table, uniform_densities(shapes, s, {first})),
        "ERK, depthwise dense": lambda s: (table, erk_densities(shapes, s, depthwise)),
        "ERK, depthwise sparse": lambda s: (table, erk_densities(shapes, s, {first})),
        "small dense": lambda s: (mobilenet_v1_table(small[s]), {}),
        "big sparse, uniform": lambda s: (
            mobilenet_v1_table(big[s]),
            uniform_densities(shapes, s, {first}) | eighty,
        ),
        "big sparse, ERK": lambda s: (mobilenet_v1_table(big[s]), erk_densities(shapes, s, {first})),
    }
    return {name: lambda s, way=way: density_cost(*way(s)) for name, way in every_way.items()}
