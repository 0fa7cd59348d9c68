"""Methods that train a variable of their own: mask and weight follow from it at each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_rigl.methods.base import Method, Moment
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.patterns import Pattern, Unstructured

VARIABLE = "variable"  # its place among the notes


def refuse_pattern(method: Method, pattern: Pattern) -> None:
    """Raise ValueError if the masks that follow from a method's variables would break the pattern."""
    if method.latent and not isinstance(pattern, Unstructured):
        raise ValueError(
            f"pattern: {type(method).__name__} makes its masks of its variables, connection by connection; "
            f"take pattern='unstructured', or a method that drops and grows, got {type(pattern).__name__}"
        )


def begin(layers: Sequence[SparseLayer], method: Method, seed: int) -> None:
    """Give each layer its variable, and the mask and weight that follow from it."""
    for layer in layers:
        layer.notes[VARIABLE] = method.begin(layer.connections(seed, -1))
    project(layers, method, Moment(0, due=False), seed)


@torch.no_grad()
def pull(layers: Sequence[SparseLayer], method: Method, step: int, seed: int) -> None:
    """Before the optimizer's step: the parameter holds the variable, and its gradient the variable's."""
    for layer in layers:
        variable, grad = layer.notes[VARIABLE], layer.parameter.grad
        if grad is not None:
            grad.copy_(method.pull(layer.connections(seed, step, layer.gradient), variable))
        layer.parameter.copy_(variable)


@torch.no_grad()
def push(layers: Sequence[SparseLayer]) -> None:
    """After it: the variable is what the parameter holds."""
    for layer in layers:
        layer.notes[VARIABLE].copy_(layer.parameter)


@torch.no_grad()
def project(layers: Sequence[SparseLayer], method: Method, moment: Moment, seed: int) -> None:
    """Take the masks and the weights that follow from the variables."""
    for layer, mask, weight in _following(layers, method, moment, seed):
        layer.parameter.copy_(weight)
        layer.replace(mask)


@torch.no_grad()
def restore(layers: Sequence[SparseLayer], method: Method, seed: int) -> None:
    """Take the weights that follow from the variables, under the masks that the layers have."""
    for layer, weight in weights(layers, method, seed).items():
        layer.parameter.copy_(weight)


@torch.no_grad()
def weights(layers: Sequence[SparseLayer], method: Method, seed: int) -> dict[SparseLayer, Tensor]:
    """The weights that follow from the variables, under the masks that the layers have; copies."""
    following = _following(layers, method, Moment(0, due=False), seed)
    return {layer: layer.masked(weight.to(layer.parameter.dtype)) for layer, _, weight in following}


def _following(
    layers: Sequence[SparseLayer], method: Method, moment: Moment, seed: int
) -> Iterator[tuple[SparseLayer, Tensor, Tensor]]:
    groups = [list(layers)] if method.scope == "model" else [[layer] for layer in layers]
    for group in groups if layers else ():
        seen = [layer.connections(seed, moment.step) for layer in group]
        variables = [layer.notes[VARIABLE] for layer in group]
        for layer, (mask, weight) in zip(group, method.project(seen, variables, moment), strict=True):
            yield layer, mask, weight
