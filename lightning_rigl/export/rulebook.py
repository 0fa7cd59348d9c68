"""Which rule belongs to which module, function and method."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from lightning_rigl.export import layer_rules, rules, shapes
from lightning_rigl.export.rules import Rule
from lightning_rigl.export.weights import LAYERS

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(rules.POINTWISE_MODULES, rules.pointwise),
    **dict.fromkeys(rules.IDLE_MODULES, rules.same),
    **dict.fromkeys(shapes.POOLS, shapes.pooled),
    **dict.fromkeys((*_NORMS, nn.PReLU), rules.channelwise),
    **dict.fromkeys(LAYERS, layer_rules.layer),
    nn.Flatten: shapes.regrouped,
    nn.Embedding: layer_rules.embedding,
}
_MOVING = ("permute", "transpose", "movedim", "squeeze", "unsqueeze", "mean", "amax", "amin")
_GROUPING = ("flatten", "reshape", "view")


def _functions() -> dict[Any, Rule]:
    found: dict[Any, Rule] = {}
    for names, rule in (
        (rules.POINTWISE_NAMES, rules.pointwise),
        (shapes.POOL_NAMES, shapes.pooled),
        (rules.DROPOUTS, rules.dropout),
        (_MOVING, shapes.moved),
        (_GROUPING, shapes.regrouped),
        (("cat", "concat", "concatenate"), shapes.concatenated),
    ):
        for name in names:
            for home in (torch, functional):
                for spelling in (name, f"{name}_"):
                    if (function := getattr(home, spelling, None)) is not None:
                        found[function] = rule
    found.update(dict.fromkeys((*rules.OPERATORS, *rules.IN_PLACE), rules.pointwise))
    return {**found, operator.getitem: rules.item, getattr: rules.attribute}


_FUNCTIONS = _functions()
_METHODS: dict[str, Rule] = {
    **dict.fromkeys(rules.POINTWISE_NAMES, rules.pointwise),
    **dict.fromkeys([f"{name}_" for name in rules.POINTWISE_NAMES], rules.pointwise),
    **dict.fromkeys(_MOVING, shapes.moved),
    **dict.fromkeys(_GROUPING, shapes.regrouped),
    "size": rules.size,
    "dim": rules.number,
}


def of_module(module: nn.Module) -> Rule | None:
    """The rule of a module that does what its class in ``torch.nn`` does, and nothing besides."""
    if is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    for kind, rule in _MODULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    return None


def of_function(target: Any) -> Rule | None:
    """The rule of a function; None: it is not understood."""
    return _FUNCTIONS.get(target)


def of_method(name: str) -> Rule | None:
    """The rule of a tensor's method; None: it is not understood."""
    return _METHODS.get(name)
