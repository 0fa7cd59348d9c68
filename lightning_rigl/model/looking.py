"""The scores of all connections before the first step, taken on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_rigl.methods.base import Method, Probe
from lightning_rigl.model import layers, sharding

SCORE = "score"  # their place among the notes


def first_scores(
    twin: nn.Module,
    method: Method,
    targets: Mapping[str, int],
    loss: Callable[[nn.Module], Tensor],
    example: Tensor | None,
) -> dict[str, Tensor]:
    """What the method gives each sparse parameter, averaged over the processes of a distributed run.

    Global random generators are as before.

    Args:
        twin: a copy of the model; it may be changed.
        method: one that looks.
        targets: cleaned name -> active connections that the distribution gives each sparse parameter.
        loss: the copy -> its loss on the first batch, with a graph.
        example: the floating input of that batch.

    Raises:
        ValueError: a score is missing, has another shape than its weight, or is not finite.
    """
    twin = uncompiled(twin)
    known = layers.named_parameters(twin)
    weights = {name: known[name] for name in targets}
    shapes = {name: weight.shape for name, weight in weights.items()}
    cuda = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    with torch.random.fork_rng(list(cuda)), torch.enable_grad():
        scores = method.look(Probe(twin, lambda: loss(twin), twin, example, weights, dict(targets)))
    for name, shape in shapes.items():
        if name not in scores or scores[name].shape != shape:
            got = tuple(scores[name].shape) if name in scores else None
            raise ValueError(
                f"method {type(method).__name__}: the score of {name} has its shape {tuple(shape)}, got {got}"
            )
    averages = {name: sharding.mean(scores[name].detach()) for name in shapes}
    for name, score in averages.items():
        if not torch.isfinite(score).all():
            raise ValueError(
                f"method {type(method).__name__}: the score of {name} is not finite; look at the loss of the "
                "first batch, and at the precision that it is computed in"
            )
    return averages


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model with its values, without the wrapper that would average its gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return copy.deepcopy(model)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model with its compiled parts replaced by what they were made of.

    A compiled graph has no second derivative, and would be compiled again for another type.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _original(child))
    return _original(model)


def _original(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else module
