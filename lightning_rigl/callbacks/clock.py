"""Optimizer steps: which one this is, how many there will be, and how far the training has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.optim import Optimizer

from lightning_rigl.model.sparsifier import Sparsifier
from lightning_rigl.topology.schedules import UpdateSchedule


class Clock:
    """Counts as the trainer does; in manual optimization each optimizer has a count of its own.

    Attributes:
        steps: index of the optimizer -> steps it has made, in manual optimization.
        length: see `training_length`.
        limits: what a fractional ``end`` refers to in manual optimization: all batches and all steps of the
            training (0 where not limited), and the length that the timetable was resolved by; None where the
            end is in an optimizer's own steps. A resumed run keeps it with the timetable.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        self.length: int | None = None
        self.limits: tuple[int, int, int] | None = None
        self._epochs: int | None = None
        self._last: int | None = None  # the epoch that SWA adds
        self._begun: int | None = None  # the optimizer that is making a step
        self._made: Any = None  # Lightning's count of steps, and what it was before this one
        self._before = 0

    def set_up(self, trainer: Trainer) -> None:
        """Note the length in epochs as the user gave it, before a callback adds to it (SWA does)."""
        self._epochs, self._begun, self._last = trainer.max_epochs, None, None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
        if averages and trainer.max_epochs != -1:
            self._last = trainer.max_epochs

    def start(self, trainer: Trainer, schedule: UpdateSchedule | None, resumed: bool) -> int | None:
        """Ask for the length of training, which loads its data.

        Args:
            trainer: the running trainer.
            schedule: what is resolved now, unless the timetable of a checkpoint goes on.
            resumed: that it does.

        Returns:
            The steps already done; None if several optimizers have made some.
        """
        self.length = training_length(trainer, self._epochs)
        if not resumed:
            self.limits = self._limits(trainer, schedule)
        if trainer.global_step == 0:
            self.steps = {}
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        return None if self.steps else 0

    def step(self, trainer: Trainer, optimizer: Optimizer) -> int:
        """Steps that the optimizer has made."""
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        self.settle()
        return self.steps.get(self._index(trainer, optimizer), 0)

    def tick(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """The optimizer begins a step, which counts once it is done: an exception may come between."""
        if not trainer.lightning_module.automatic_optimization:
            self.settle()
            self._begun, self._before = self._index(trainer, optimizer), trainer.global_step
            self._made = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total

    def settle(self) -> None:
        """Count the step that was begun, if it is done."""
        if self._begun is not None and self._made.completed > self._before:
            self.steps[self._begun] = self.steps.get(self._begun, 0) + 1
            self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """The counts and what a fractional ``end`` refers to, in plain types."""
        self.settle()
        return {"steps": dict(self.steps), "limits": self.limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self.limits = dict(state.get("steps", {})), state.get("limits")

    def _index(self, trainer: Trainer, optimizer: Optimizer) -> int:
        return next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)

    def _limits(self, trainer: Trainer, schedule: UpdateSchedule | None) -> tuple[int, int, int] | None:
        by_steps = trainer.lightning_module.automatic_optimization
        if by_steps or schedule is None or not isinstance(schedule.end, float) or self.length is None:
            return None
        batches, epochs = trainer.num_training_batches, self._epochs
        limited = epochs not in (None, -1) and math.isfinite(batches)
        return int(batches * (epochs or 0)) if limited else 0, max(trainer.max_steps, 0), self.length

    def time(self, trainer: Trainer) -> float | None:
        """The time by which a fractional ``end`` is told where no optimizer's own steps tell it."""
        if self.limits is None:
            return None
        *limits, length = self.limits
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        done = zip((batches, trainer.global_step), limits, strict=True)
        return max(n * length / total for n, total in done if total)  # exact where it is a whole number

    def is_over(self, trainer: Trainer) -> bool:
        """Whether this epoch is the one that SWA adds, to collect the statistics of its average."""
        return self._last is not None and trainer.current_epoch >= self._last

    def refuse_unknown(self, trainer: Trainer, schedule: UpdateSchedule | None) -> None:
        """Raise ValueError for a schedule in fractions of what nobody knows.

        The length is asked for only where it can be unknown, because that loads the training data.
        """
        if schedule is None:
            return
        if not trainer.lightning_module.automatic_optimization and isinstance(schedule.begin, float):
            raise ValueError(
                f"begin={schedule.begin}, a fraction of training, in manual optimization: each optimizer "
                "counts its own steps there, and nobody knows how many it will make; give begin=<steps>"
            )
        if not schedule.in_steps and trainer.max_steps == -1:
            schedule.resolve(training_length(trainer, self._epochs))


def training_length(trainer: Trainer, epochs: int | None) -> int | None:
    """Optimizer steps of the whole training; in manual optimization its batches, if these are limited.

    Args:
        trainer: the running trainer; its training data are loaded.
        epochs: its ``max_epochs`` as the user gave it, which a callback may have raised since.

    Returns:
        None if unknown (an endless loader, or no limit at all).
    """
    estimate = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if epochs in (None, -1) or not math.isfinite(batches):
        return int(estimate) if math.isfinite(estimate) and estimate >= 0 else None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    windows = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    steps = 0
    for epoch in range(max(epochs or 0, 1)):
        window = (
            windows[-1].get_accumulate_grad_batches(epoch) if windows else trainer.accumulate_grad_batches
        )
        steps += math.ceil(batches / window)
    by_hand = not trainer.lightning_module.automatic_optimization
    return steps if by_hand or trainer.max_steps == -1 else min(steps, trainer.max_steps)


def shortfall(
    trainer: Trainer, sparsifier: Sparsifier, length: int | None, resumed: bool = False
) -> str | None:
    """What to say of a training that is too short for its updates; None if there is nothing to say."""
    timetable = sparsifier.timetable
    trial: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    if timetable is None or length is None or trial or not trainer.lightning_module.automatic_optimization:
        return None
    if timetable.begin >= min(length, timetable.end):
        return (
            f"no topology update will take place: the first is due at step {timetable.begin}, updates end at "
            f"{timetable.end}, training has {length} steps; lower every, or begin"
        )
    if trainer.global_step >= timetable.end and not resumed:
        return (
            f"no topology update will take place: the last is due before step {timetable.end}, and this "
            f"training goes on from step {trainer.global_step} of a dense one; raise end, or start at step 0"
        )
    if sparsifier.method.prunes_along and not resumed and timetable.begin + timetable.every >= timetable.end:
        return (
            f"{type(sparsifier.method).__name__} prunes from dense to its target at once, at step "
            f"{timetable.begin}: its only update every {timetable.every} steps before step {timetable.end}; "
            "lower every"
        )
    if length < timetable.end:
        return f"training has {length} steps and ends before the updates do, at {timetable.end}; lower end"
    return None


def unfinished(sparsifier: Sparsifier) -> str | None:
    """What to say at the end of a training whose optimizers made too few steps; None if there is nothing."""
    name, target = type(sparsifier.method).__name__, sum(x.target for x in sparsifier.layers.values())
    active = sum(layer.count for layer in sparsifier.layers.values())
    if not sparsifier.updates:
        return "no topology update took place: no optimizer has made as many steps as the first needs"
    if sparsifier.method.prunes_along and active > target:
        return (
            f"{name} has left {active:,} connections, and {target:,} were asked for: an optimizer has not "
            "made a step at which its last update is due; give begin and end in its steps"
        )
    return None
