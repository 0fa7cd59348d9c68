"""The gradient that chooses new connections, from batches that nothing else is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rigl.callbacks.first_look import copied, loss_of
from lightning_rigl.callbacks.twins import told_the_time
from lightning_rigl.model import layers, sharding
from lightning_rigl.model.sparsifier import Sparsifier


class HeldOut:
    """Gives each update the gradient of a batch of its own.

    Args:
        data: batches as the training step takes them, read in order and over again.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._batches: Iterator[Any] | None = None
        self._next: tuple[int, Any] = -1, None  # for the update after so many: it may be postponed

    def start(self, updates: int) -> None:
        """A training begins; a resumed one goes on after the batches of the updates that were done."""
        again = chain.from_iterable(repeat(self._data))
        self._batches, self._next = islice(again, updates, None), (-1, None)

    def keep(self, trainer: Trainer, module: LightningModule, sparsifier: Sparsifier) -> None:
        """Have the next update read the gradient of the next batch, averaged over the processes.

        It is computed on a copy: statistics, gradients, logs and random generators are as before.

        Raises:
            MisconfigurationException: the module cannot be copied, or its step gives no loss on a copy.
        """
        assert self._batches is not None
        if self._next[0] != sparsifier.updates:
            self._next = sparsifier.updates, next(self._batches)
        batch = trainer.strategy.batch_to_device(self._next[1], module.device)
        with isolate_rng(include_cuda=module.device.type == "cuda"), torch.enable_grad():
            twin = copied(trainer, module, "growth_data needs a copy of the module, which has none")
            twin = told_the_time(twin, trainer)
            failed = "growth_data needs the loss of a training_step, which a copy does not give"
            loss_of(trainer, twin, batch, 0, failed).backward()  # type: ignore[no-untyped-call]
        weights = layers.named_parameters(twin)
        for name, layer in sparsifier.layers.items():
            grad = weights[name].grad
            layer.kept = None if grad is None else sharding.mean(grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_batches": None, "_next": (-1, None)}  # iterators stay here
