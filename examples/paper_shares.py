"""The paper's networks and what every method costs on them, as a share of the dense network.

Training is the mean over an endless run, by the closed forms of the paper's appendix H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import paper_numbers as published
from lightning_rigl.flops.closed_forms import gradual_pruning, rigl, snfs, static
from lightning_rigl.flops.formulas import forward_cost
from paper_costs import (
    Forward,
    char_lm_table,
    mobilenet_v1_forward,
    mobilenet_v2_table,
    of_masks,
    resnet50_table,
    wrn22x2_table,
)
from paper_numbers import Published

System = Callable[[float], tuple[int, int | Fraction]]  # sparsity -> f_S, and the mean cost of a step
SPARSITIES = (0.8, 0.9, 0.95, 0.965, 0.99)
SHOWN = ("Static", "RigL", "SNFS", "Pruning", "Static (ER)", "Static (ERK)", "RigL (ERK)", "SNFS (ERK)")


@dataclass(frozen=True)
class Network:
    """What a table is made of.

    Args:
        title: the network, the data and the rule of counting.
        dense: f_D.
        systems: by name.
        shown: what has a row at every sparsity; other systems have one where a number was published.
        published: the numbers to compare with.
        notes: letter -> explanation.
        sparsities: in the order of the table.
        dense_published: f_D and the cost of training, as printed.
        samples: samples of the whole training, 1 for the cost of one.
    """

    title: str
    dense: int
    systems: Mapping[str, System]
    shown: Sequence[str] = SHOWN
    published: Sequence[Published] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    sparsities: Sequence[float] = SPARSITIES
    dense_published: tuple[str, str] = ("", "")
    samples: int = 1


def trained(form: Callable[[int], int | Fraction], forward: Forward) -> System:
    """A method with a distribution: ``form`` gives the mean cost of a step from f_S."""
    return lambda sparsity: (forward(sparsity), form(forward(sparsity)))


def systems(
    dense: int,
    distributions: Mapping[str, Forward],
    prune: Callable[[int, int], Fraction] = gradual_pruning,
) -> dict[str, System]:
    """Every method with every distribution, whose name stands behind that of the method."""
    forms = {"RigL": rigl, "SNFS": snfs, "Pruning": prune}
    of_forward = {name: partial(form, forward_dense=dense) for name, form in forms.items()}
    return {
        method + name: trained(form, forward)
        for name, forward in distributions.items()
        for method, form in {"Static": static, "SET": static, **of_forward}.items()
    }


def resnet50() -> Network:
    """Figure 2, tables 3 and 4 of the paper, and the README."""
    cost = partial(forward_cost, convention="official")
    dense = cost(resnet50_table())
    widths = {0.8: 0.445, 0.9: 0.34, 0.95: 0.26, 0.965: 0.231}
    small = trained(static, lambda sparsity: cost(resnet50_table(widths[sparsity])))
    return Network(
        "ResNet-50 on ImageNet, official rule",
        dense,
        {**systems(dense, of_masks(resnet50_table(), "official")), "Small-Dense": small},
        (*SHOWN, "RigL (ERK*)"),
        published.RESNET50,
        published.RESNET50_NOTES,
        dense_published=("8.2e9", "3.2e18"),
        samples=32_000 * 4096,
    )


def mobilenet_v1() -> Network:
    """Figure 3, right."""
    ways = mobilenet_v1_forward()
    dense = ways["dense"](0.0)
    distributions = {
        "": ways["uniform, depthwise dense"],
        " (ERK)": ways["ERK, depthwise dense"],
        ", dw sparse": ways["uniform, depthwise sparse"],
        " (ERK), dw sparse": ways["ERK, depthwise sparse"],
    }
    widths = {
        "Small-Dense": trained(static, ways["small dense"]),
        "Big-Sparse": trained(static, ways["big sparse, uniform"]),
        "Big-Sparse (ERK)": trained(static, ways["big sparse, ERK"]),
    }
    return Network(
        "MobileNet-v1 on ImageNet, official rule",
        dense,
        {**systems(dense, distributions), **widths},
        [name for name in SHOWN if name != "Static (ER)"],
        published.MOBILENET_V1,
        published.MOBILENET_V1_NOTES,
        (0.75, 0.8, 0.85, *SPARSITIES[1:]),
        ("1.1e9", "4.5e17"),
        32_000 * 4096,
    )


def mobilenet_v2() -> Network:
    """Nothing was published; the depthwise layers are dense."""
    table = mobilenet_v2_table()
    depthwise = [layer.name for layer in table.layers if ".dw." in layer.name]
    dense = forward_cost(table)
    title = "MobileNet-v2 on ImageNet, 2 FLOPs a multiply-add"
    return Network(title, dense, systems(dense, of_masks(table, "2mac", depthwise)))


def wrn22x2() -> Network:
    """The reproducibility report, table 2."""
    dense = forward_cost(wrn22x2_table())
    small = trained(static, lambda sparsity: forward_cost(wrn22x2_table((1 - sparsity) ** 0.5)))
    prune = partial(gradual_pruning, total=87_800, begin=700, end=65_918, every=100)
    return Network(
        "WRN-22-2 on CIFAR-10, 2 FLOPs a multiply-add",
        dense,
        {**systems(dense, of_masks(wrn22x2_table(), "2mac"), prune), "Small-Dense": small},
        (*SHOWN, "Small-Dense"),
        published.WRN22X2,
        published.WRN22X2_NOTES,
        dense_published=("3.15e8", "9.45e8 e"),
    )


def char_lm() -> Network:
    """Appendix I; no FLOPs were published. The embedding, which is the last layer, too, is dense."""
    table = char_lm_table()
    dense = forward_cost(table)
    prune = partial(gradual_pruning, total=199_000, begin=50_000, end=150_000)
    return Network(
        "GRU over characters, per character, 2 FLOPs a multiply-add",
        dense,
        systems(dense, of_masks(table, "2mac", dense=["emb.weight"], dense_first=False), prune),
        ("Static", "RigL", "SNFS", "Pruning"),
        notes=published.CHAR_LM_NOTES,
        sparsities=(0.75, *SPARSITIES),
    )
