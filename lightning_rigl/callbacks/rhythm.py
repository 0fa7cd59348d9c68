"""When and how the callbacks log: `LightningModule.log` on every step would cost a small model dearly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rigl.model.sparsifier import Sparsifier


def log_step(
    trainer: Trainer,
    module: LightningModule,
    levels: Callable[[], Mapping[str, float]],
    event: bool = False,
) -> None:
    """Log from ``on_train_batch_end``, every ``log_every_n_steps`` and when something has happened.

    The loggers are called here, at this step: what Lightning is given to hand over, it hands over again, by
    then out of date, when a callback stops the training between two times.

    Args:
        trainer: the running trainer.
        module: the module that is trained.
        levels: name -> value; called only when something is logged.
        event: something has happened on this step.
    """
    if trainer.barebones or not (event or _is_time(trainer, module)):
        return
    values = levels()
    log_levels(module, values, on_step=True)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the x-axis of `LightningModule.log`
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def _is_time(trainer: Trainer, module: LightningModule) -> bool:
    """Whether Lightning logs at this batch: not while batches are accumulated."""
    accumulating = module.automatic_optimization and trainer.fit_loop._should_accumulate()
    return trainer._logger_connector.should_update_logs and not accumulating


def log_levels(module: LightningModule, levels: Mapping[str, float], on_step: bool) -> None:
    """Log values that are levels, as they stand now on this process: nothing is averaged over devices.

    Args:
        module: the module that is trained.
        levels: name -> value.
        on_step: True from a batch hook, False from an epoch hook.
    """
    module.log_dict(
        # float32, Lightning's choice for plain numbers, is not exact beyond 2^24
        {name: torch.tensor(value, dtype=torch.float64) for name, value in levels.items()},
        logger=False if on_step else None,  # `log_step` tells the loggers itself
        on_step=on_step,
        on_epoch=not on_step,
        batch_size=1,
        # together these reduce nothing, and spare distributed runs Lightning's advice to average
        sync_dist=True,
        rank_zero_only=True,
    )


def sparsity_levels(sparsifier: Sparsifier) -> dict[str, float]:
    """What `RigLCallback` logs."""
    return {
        "sparsity/density": sparsifier.density,
        "sparsity/drop_fraction": sparsifier.drop_fraction,
        "sparsity/updates": float(sparsifier.updates),
    }


def log_hyperparameters(trainer: Trainer, sparsifier: Sparsifier, settings: Mapping[str, Any]) -> None:
    """Hand the settings to the loggers, and what became of them: schedule, its end in steps, seed."""
    end = sparsifier.timetable.end if sparsifier.timetable else None
    resolved = {**settings, "schedule": sparsifier.schedule, "seed": sparsifier.seed, "end": end}
    plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in resolved.items()}
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams({f"sparsity/{name}": value for name, value in plain.items()})
        except Exception as error:  # MLflow refuses another value, as the end has in a second fit
            rank_zero_warn(f"RigLCallback: {type(logger).__name__} did not take the settings: {error}")
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:  # it has written them before
            save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams)
