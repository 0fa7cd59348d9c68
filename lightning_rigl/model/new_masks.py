"""One update: scores asked of the method, counted and chosen by the pattern, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.model.answers import checked_counts, checked_score
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.patterns import Pattern


def new_masks(
    layers: Sequence[SparseLayer], method: Method, pattern: Pattern, moment: Moment, seed: int
) -> Iterator[tuple[SparseLayer, Connections, Tensor, Tensor]]:
    """Layers that an update changes, as the method sees them, what it keeps, and the mask. Changes nothing.

    Unless the method counts over the whole model, one layer after the other is looked at. A layer that is
    frozen, or has no gradient in this step where the method needs one, keeps its mask. ValueError: a score of
    another shape than the weight, or counts that are not those of connections.
    """
    reads = method.gradient != "never"
    able = [x for x in layers if x.parameter.requires_grad and (x.chooses is not None or not reads)]
    for group in [able] if method.scope == "model" else [[layer] for layer in able]:
        seen = [layer.connections(seed, moment.step, layer.chooses if reads else None) for layer in group]
        counts = method.turnover(seen, moment) if seen else []
        if len(counts) != len(seen):
            raise ValueError(f"{type(method).__name__}.turnover: {len(seen)} pairs wanted, got {counts!r}")
        for layer, own, pair in zip(group, seen, counts, strict=True):
            dropped, grown = checked_counts(pair, layer, method)
            if dropped or grown:
                kept = mask = own.mask
                if dropped:
                    kept = mask = pattern.drop(
                        checked_score(method.drop_score(own), own, method), kept, dropped
                    )
                if grown:
                    mask = pattern.grow(checked_score(method.grow_score(own), own, method), kept, grown)
                yield layer, own, kept, mask
