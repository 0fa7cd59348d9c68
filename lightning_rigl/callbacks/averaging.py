"""Weight averages mix topologies; what is validated, saved and returned keeps the zeros of the masks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_rigl.model.layers import clean_name
from lightning_rigl.model.sparsifier import Sparsifier


def follow_averages(trainer: Trainer, callback: Callback) -> None:
    """Put the callback behind those that average weights, so that its hooks see what they did."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    averages = (StochasticWeightAveraging, WeightAveraging)
    last = max((i for i, other in enumerate(callbacks) if isinstance(other, averages)), default=0)
    if any(other is callback for other in callbacks[:last]):
        # a new list: Lightning is walking through the old one
        before = [other for other in callbacks[: last + 1] if other is not callback]
        trainer.callbacks = [*before, callback, *callbacks[last + 1 :]]  # type: ignore[attr-defined]


def mask_saved_weights(sparsifier: Sparsifier, checkpoint: dict[str, Any]) -> None:
    """Mask what a checkpoint holds as the model's weights, where that is not the model's own memory."""
    saved = checkpoint["state_dict"]
    for key, values in saved.items():
        layer = sparsifier.layers.get(clean_name(key))
        if layer is not None and values.data_ptr() != layer.parameter.data_ptr():
            saved[key] = layer.masked(values)
