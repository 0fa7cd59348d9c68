"""A training that ends when its FLOPs are spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_rigl.callbacks.clock import training_length
from lightning_rigl.callbacks.meter import Meter
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.flops.formulas import step_cost
from lightning_rigl.flops.runs import budget_in_flops, longest_run, run_cost
from lightning_rigl.model import sharding
from lightning_rigl.model.sparsifier import Sparsifier


class Budget:
    """FLOPs that a training may cost, over all devices, by the paper's rule.

    Args:
        amount: FLOPs, or a multiple such as ``"1.0x"`` of what the configured training would cost the dense
            model.

    Raises:
        ValueError: an amount that is not positive, or of another form.
    """

    def __init__(self, amount: float | str) -> None:
        if budget_in_flops(amount, dense_step=10**9, steps=10**9) < 1:
            raise ValueError(
                "budget: a positive number of FLOPs, or a multiple of the dense training such as '1.0x', got "
                f"{amount!r}"
            )
        self.amount = amount
        self.is_multiple = isinstance(amount, str) and amount.strip().lower().endswith("x")
        self._flops: int | None = None  # None until a multiple of this training is known
        self._epochs: int | None = None
        self._is_new = True  # in this fit
        self._carried = 0  # what earlier fits have cost
        self._is_spent = False
        self.forget()

    def forget(self) -> None:
        """Nothing is known of the batches."""
        self._samples = 0  # in the largest batch so far, on this device
        self._dense = 0  # FLOPs of the costliest so far, in one forward pass of the dense model
        self._seen = 0, 0  # samples so far in this training, and FLOPs of their forward passes if dense

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to stop at the same step."""
        return {"samples": self._samples, "dense": self._dense, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._samples, self._dense, (samples, flops) = state["samples"], state["dense"], state["seen"]
        self._seen = samples, flops

    def set_up(self, trainer: Trainer) -> None:
        """A fit begins; its length in epochs is as the user gave it, before a callback adds to it."""
        self._epochs, self._is_new, self._is_spent = trainer.max_epochs, True, False
        self._flops = None if self.is_multiple else budget_in_flops(self.amount, 0, None)

    def refuse_too_little(self, trainer: Trainer, samples: int, meter: Meter) -> None:
        """Raise MisconfigurationException if the budget does not pay for the first step, which begins."""
        batches = min(trainer.accumulate_grad_batches, trainer.num_training_batches)
        first = 3 * meter.cost.of(int(batches * samples * trainer.world_size)).forward
        if self._flops is not None and first > self._flops:
            raise MisconfigurationException(
                f"FLOPsCallback(budget={self.amount!r}): the first optimizer step costs {first:.4g} FLOPs; "
                "give more, or fewer samples per step"
            )

    def start(self, trainer: Trainer, spent: int) -> None:
        """Training begins.

        Args:
            trainer: the running trainer; only now may its length be asked for, which loads the data.
            spent: what earlier fits have cost, over all devices.

        Raises:
            MisconfigurationException: a multiple of a length that nobody knows.
        """
        if trainer.global_step == 0:
            self._seen = 0, 0
        self._carried = spent if trainer.global_step == 0 else 0
        if self.is_multiple and training_length(trainer, self._epochs) is None:
            raise MisconfigurationException(
                f"FLOPsCallback(budget={self.amount!r}): a multiple of the cost of the configured training, "
                "whose length is unknown; give max_steps, or a number of FLOPs"
            )

    def note(self, samples: int, forward_dense: int) -> None:
        """A batch has been trained on: its samples, and what one forward pass costs the dense model."""
        self._samples = max(self._samples, samples)
        self._dense = max(self._dense, forward_dense)
        self._seen = self._seen[0] + samples, self._seen[1] + forward_dense

    def check(self, trainer: Trainer, spent: int, meter: Meter, rigl: RigLCallback | None) -> None:
        """Stop the training if its next step costs more than is left; all processes ask together.

        Args:
            trainer: the running trainer.
            spent: by this device.
            meter: knows what a sample costs.
            rigl: knows when the topology is updated.
        """
        if (self._is_new or self.is_multiple) and trainer.global_step > 0:
            self._resolve(trainer, meter, rigl.sparsifier if rigl else None)
        total = sharding.total(spent + self._next_step(trainer, meter, rigl), trainer.strategy.root_device)
        if self._flops is None or total <= self._flops:
            return
        if not self._is_spent:
            rank_zero_info(f"FLOPsCallback: the budget of {self._flops:.4g} FLOPs is spent; training stops.")
        self._is_spent = trainer.should_stop = True

    def _next_step(self, trainer: Trainer, meter: Meter, rigl: RigLCallback | None) -> int:
        """What the next optimizer step costs on this device, if its batches are as the costliest so far.

        Of a multiple, whose whole is only estimated from the batches so far: as their mean.
        """
        cost, sparsifier = meter.cost, rigl.sparsifier if rigl else None
        gradient = sparsifier.method.gradient if sparsifier else "never"
        sample = step_cost(cost.forward, cost.forward_dense, gradient == "every_step")
        if rigl and gradient == "at_updates":
            sample += meter.cost_of(_due(trainer, rigl)).extra
        samples, flops = self._seen if self.is_multiple else (self._samples, self._dense)
        dense = _next_samples(trainer, self._samples) * flops // max(samples, 1)
        return dense * sample // max(cost.forward_dense, 1)

    def _resolve(self, trainer: Trainer, meter: Meter, sparsifier: Sparsifier | None) -> None:
        """Find the number of FLOPs, of a multiple anew after each step by the batches so far.

        At first, warn of a training that ends before they are spent.
        """
        length = self._length(trainer)
        if length is None:
            self._is_new = False
            return
        seen, flops = self._seen
        planned = _planned_samples(trainer, length, self._samples)
        dense = sharding.total(3 * flops * planned // max(seen, 1), trainer.strategy.root_device)
        if not dense:
            return  # nothing is measured yet
        is_new, self._is_new = self._is_new, False
        self._flops = budget_in_flops(self.amount, dense, steps=1)
        if is_new:
            everywhere = dense * seen // (3 * max(flops, 1))  # samples of all devices
            self._foresee(trainer, meter, sparsifier, length, everywhere)

    def _foresee(
        self, trainer: Trainer, meter: Meter, sparsifier: Sparsifier | None, length: int, samples: int
    ) -> None:
        """Warn if a training of this length, with so many samples in all, cannot spend the budget."""
        gradient = sparsifier.method.gradient if sparsifier else "never"
        schedule = sparsifier.schedule if sparsifier else None
        planned = run_cost(meter.cost, length, gradient, schedule, samples).train // length
        left = (self._flops or 0) - self._carried
        if planned >= 0.99 * left or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        steps = longest_run(left * length, meter.cost, gradient, schedule, samples)
        if steps > length:
            rank_zero_warn(
                f"FLOPsCallback: the budget of {self._flops:.4g} FLOPs cannot be spent, this training costs "
                f"{planned:.4g}; about max_steps={round(steps * _steps_per_batch(trainer))} would spend it"
            )

    def _length(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the training; in manual optimization its batches."""
        length = training_length(trainer, self._epochs)
        if length is None or trainer.max_steps == -1:
            return length
        return min(length, math.ceil(trainer.max_steps / _steps_per_batch(trainer)))


def _planned_samples(trainer: Trainer, length: int, batch: int) -> int:
    """Samples that this device trains on in a number of optimizer steps, if its batches are of one size."""
    batches, samples, epoch = trainer.num_training_batches, 0, 0
    if not math.isfinite(batches):
        return length * trainer.accumulate_grad_batches * batch
    while length > 0:
        window = _window(trainer, epoch)
        steps = math.ceil(batches / window)
        samples += _epoch_samples(trainer, batch) if steps <= length else length * window * batch
        length, epoch = length - steps, epoch + 1
    return samples


def _epoch_samples(trainer: Trainer, batch: int) -> int:
    """With the last, smaller batch as it is, where the loader tells."""
    most, loader = int(trainer.num_training_batches * batch), trainer.train_dataloader
    if isinstance(loader, DataLoader) and loader.batch_size == batch and isinstance(loader.sampler, Sized):
        return min(most, len(loader.sampler))
    return most


def _next_samples(trainer: Trainer, batch: int) -> int:
    """Samples that this device trains on in the next optimizer step, if its batches are of one size."""
    batches, begun = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready
    epoch, begun = (trainer.current_epoch + 1, 0) if begun >= batches else (trainer.current_epoch, begun)
    window = _window(trainer, epoch)
    window -= begun % window
    if not math.isfinite(batches):
        return window * batch
    return min(window * batch, _epoch_samples(trainer, batch) - begun * batch)


def _window(trainer: Trainer, epoch: int) -> int:
    """Batches of an optimizer step in this epoch."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    windows = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    return windows[-1].get_accumulate_grad_batches(epoch) if windows else trainer.accumulate_grad_batches


def _steps_per_batch(trainer: Trainer) -> float:
    """In manual optimization, of all optimizers together, on average so far; else 1."""
    if trainer.lightning_module.automatic_optimization:
        return 1
    return max(trainer.global_step, 1) / max(trainer.fit_loop.total_batch_idx + 1, 1)


def _due(trainer: Trainer, rigl: RigLCallback) -> set[str]:
    """The layers whose update is due at the next step, as far as one can know."""
    sparsifier, clock = rigl.sparsifier, rigl._clock
    if sparsifier is None or sparsifier.timetable is None:
        return set()
    time = clock.time(trainer)
    due = [o for o in trainer.optimizers if sparsifier.is_due(o, clock.step(trainer, o), time)]
    return {layer.name for optimizer in due for layer in sparsifier.layers.of(optimizer)}
