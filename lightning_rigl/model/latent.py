"""Methods that train a variable of their own: mask and weight follow from it at each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rigl.methods.base import Method, Moment
from lightning_rigl.model.sparse_layer import SparseLayer

VARIABLE = "variable"  # its place among the notes


def begin(layers: Sequence[SparseLayer], method: Method, seed: int) -> None:
    """Give each layer its variable, and the mask and weight that follow from it."""
    for layer in layers:
        layer.notes[VARIABLE] = method.begin(layer.connections(seed, -1, with_gradient=False))
    project(layers, method, Moment(0, due=False), seed)


@torch.no_grad()
def pull(layers: Sequence[SparseLayer], method: Method, step: int, seed: int) -> None:
    """Before the optimizer's step: the parameter holds the variable, and its gradient the variable's."""
    for layer in layers:
        variable, grad = layer.notes[VARIABLE], layer.parameter.grad
        if grad is not None:
            grad.copy_(method.pull(layer.connections(seed, step, with_gradient=True), variable))
        layer.parameter.copy_(variable)


@torch.no_grad()
def push(layers: Sequence[SparseLayer]) -> None:
    """After it: the variable is what the parameter holds."""
    for layer in layers:
        layer.notes[VARIABLE].copy_(layer.parameter)


@torch.no_grad()
def project(layers: Sequence[SparseLayer], method: Method, moment: Moment, seed: int) -> None:
    """Take the masks and the weights that follow from the variables."""
    groups = [list(layers)] if method.scope == "model" else [[layer] for layer in layers]
    for group in groups:
        seen = [layer.connections(seed, moment.step, with_gradient=False) for layer in group]
        variables = [layer.notes[VARIABLE] for layer in group]
        for layer, (mask, weight) in zip(group, method.project(seen, variables, moment), strict=True):
            layer.parameter.copy_(weight)
            layer.replace(mask)
