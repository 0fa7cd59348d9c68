"""The hidden units inside the transformer layers of ``torch.nn``, which are one step of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rigl.export import rulebook
from lightning_rigl.export.dead_units import Liveness, follow
from lightning_rigl.export.shrink import shrink
from lightning_rigl.export.trace import Run, trace

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class _FeedForward(nn.Module):
    """The part of a transformer layer between its second norm and the stream."""

    def __init__(
        self, linear1: nn.Module, activation: Callable[[Tensor], Tensor], linear2: nn.Module
    ) -> None:
        super().__init__()
        self.linear1, self.activation, self.linear2 = linear1, activation, linear2

    def forward(self, x: Tensor) -> Any:
        return self.linear2(self.activation(self.linear1(x)))


def cut_feed_forwards(model: nn.Module) -> set[int]:
    """Remove the dead hidden units of ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``.

    Args:
        model: a copy that may be changed. Layers of its own classes, and weights that are shared, stay whole.

    Returns:
        Identities of the layers that were cut.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    done = set()
    for layer in model.modules():
        kind = next((kind for kind in _LAYERS if isinstance(layer, kind)), None)
        if kind is None or type(layer).forward is not kind.forward:
            continue
        own: Any = layer
        part = _FeedForward(own.linear1, own.activation, own.linear2)
        if all(uses[id(p)] == 1 for p in part.parameters()) and _cut(part, own.linear1):
            done.add(id(layer))
    return done


def _cut(part: _FeedForward, first: nn.Module) -> bool:
    """Cut both layers in place; False where something in between is not understood."""
    if not isinstance(first, nn.Linear):
        return False
    args = (torch.zeros(1, first.in_features, dtype=first.weight.dtype, device=first.weight.device),)
    try:
        graph, whole = trace(part.eval(), args, lambda m: rulebook.of_module(m) is not None)
    except ValueError:  # an activation of one's own that decides by values
        return False
    run = Run(graph)
    run.once(args)
    context, _ = follow(graph, run, whole)
    hidden = first.out_features
    shrink(context, Liveness(context), set(), select=False)
    return first.out_features < hidden
