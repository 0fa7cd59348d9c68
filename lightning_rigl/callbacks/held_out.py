"""The gradient that chooses new connections, from batches that nothing else is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rigl.callbacks.first_look import copied, loss_of
from lightning_rigl.callbacks.twins import told_the_time
from lightning_rigl.model import layers, sharding
from lightning_rigl.model.sparsifier import Sparsifier

NUMBERS = "growth_data"  # among those that are saved,
TAKEN, STEP = "taken", "step"  # batches; the step of the last


class HeldOut:
    """Gives each update the gradient of a batch of its own.

    An update that is postponed, as the gradient of its batch was not finite, takes the next one. How many
    were taken, and at which step the last, is among the sparsifier's numbers, which are saved.

    Args:
        data: batches as the training step takes them, read in order and over again.

    Raises:
        TypeError: data that cannot be read over again.
        ValueError: there are no batches.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        _check(data)
        self._data = data
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None  # the last one that was taken

    def start(self, sparsifier: Sparsifier, resumed: bool) -> None:
        """A training begins, and goes on after the batches that were taken.

        Args:
            sparsifier: of the module; it knows what was taken.
            resumed: a checkpoint goes on; the step that took the last batch may have to be done again.
        """
        numbers = sparsifier.numbers.setdefault(NUMBERS, {})
        taken = int(numbers.setdefault(TAKEN, float(sparsifier.updates)))
        if not resumed:
            numbers[STEP] = -1.0  # steps are counted anew
        again = numbers.setdefault(STEP, -1.0) >= 0
        self._batches = islice(self._over_and_over(), taken - again, None)
        self._batch = next(self._batches) if again else None

    def _over_and_over(self) -> Iterator[Any]:
        some = True
        while some:
            some = False
            for batch in self._data:
                some = True
                yield batch
        raise ValueError(
            f"growth_data: a pass over this {type(self._data).__name__} gives no batch; give a loader or a "
            "list of batches, which can be read over and over"
        )

    def keep(self, trainer: Trainer, module: LightningModule, sparsifier: Sparsifier) -> None:
        """Have the next update read the gradient of the next batch, averaged over the processes.

        It is computed on a copy: statistics, gradients, logs and random generators are as before.

        Raises:
            MisconfigurationException: the module cannot be copied, or its step gives no loss on a copy.
            ValueError: there is no batch.
        """
        assert self._batches is not None
        numbers, step = sparsifier.numbers[NUMBERS], float(trainer.global_step)
        if numbers[STEP] != step:
            self._batch = next(self._batches)
            numbers[STEP] = step
            numbers[TAKEN] += 1
        batch = trainer.strategy.batch_to_device(self._batch, module.device)
        with isolate_rng(include_cuda=module.device.type == "cuda"), torch.enable_grad():
            twin = copied(trainer, module, "growth_data needs a copy of the module, which has none")
            twin = told_the_time(twin, trainer)
            failed = "growth_data needs the loss of a training_step, which a copy does not give"
            loss_of(trainer, twin, batch, 0, failed).backward()  # type: ignore[no-untyped-call]
        weights = layers.named_parameters(twin)
        for name, layer in sparsifier.layers.items():
            grad = weights[name].grad
            layer.held_out = None if grad is None else sharding.mean(grad)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_batches": None, "_batch": None}  # iterators stay here


def _check(data: object) -> None:
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"growth_data: batches, such as a loader or a list of them, got {data!r}")
    if isinstance(data, Iterator):
        raise TypeError(
            f"growth_data: a {type(data).__name__} can be read once, and updates may need more batches than "
            "it has, a resumed run the same again; give the loader itself, or list(...) of the batches"
        )
    if isinstance(data, (list, tuple)) and not data:
        raise ValueError(f"growth_data: there is no batch in {data!r}; give one or more, or None")
