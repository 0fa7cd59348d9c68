"""What a Trainer can do, asked before the model is touched."""

from __future__ import annotations

import math

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import LBFGS

from lightning_rigl.topology.schedules import Timetable, UpdateSchedule


def refuse_trainer(trainer: Trainer) -> None:
    """Raise MisconfigurationException for a strategy or a callback that sparse training cannot run beside."""
    strategy = trainer.strategy
    sharded = isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))
    if sharded or "XLA" in type(strategy).__name__:
        raise MisconfigurationException(
            f"RigLCallback does not run with {type(strategy).__name__}: it needs the whole gradient of each "
            "layer in each process; use strategy='ddp' or a single device"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise MisconfigurationException(
            "RigLCallback and ModelPruning both decide which weights are zero; remove one of them"
        )


def refuse_optimizers(trainer: Trainer) -> None:
    """Raise MisconfigurationException for an optimizer whose state cannot follow a mask."""
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "RigLCallback does not work with LBFGS: its history mixes all weights, and it evaluates several "
            "gradients a step; use a first-order optimizer such as SGD or AdamW"
        )


def refuse_unknown_length(trainer: Trainer, schedule: UpdateSchedule | None) -> None:
    """Raise ValueError for a schedule in fractions of a length that nobody knows.

    The length is asked for only where it can be unknown, because that loads the training data.
    """
    if schedule is not None and not schedule.in_steps and trainer.max_steps == -1:
        schedule.resolve(training_length(trainer))


def training_length(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole training; None if unknown (an endless loader, or no limit at all)."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total >= 0 else None


def shortfall(trainer: Trainer, timetable: Timetable | None, length: int | None) -> str | None:
    """What to say of a training that is too short for its updates; None if there is nothing to say."""
    trial: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    if timetable is None or length is None or trial:
        return None
    if timetable.begin >= min(length, timetable.end):
        return (
            f"no topology update will take place: the first is due at step {timetable.begin}, updates end at "
            f"{timetable.end}, training has {length} steps; lower every, or begin"
        )
    if length < timetable.end:
        return f"training has {length} steps and ends before the updates do, at {timetable.end}; lower end"
    return None
