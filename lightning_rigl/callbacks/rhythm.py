"""When and how the callbacks log: `LightningModule.log` on every step would cost a small model dearly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer


def should_log(trainer: Trainer, event: bool = False) -> bool:
    """Whether this training step is worth a point: every ``log_every_n_steps``, and when something happened.

    Args:
        trainer: the running trainer.
        event: something happened on this step that should be seen at once.
    """
    return not trainer.barebones and (event or trainer._logger_connector.should_update_logs)


def log_step(
    trainer: Trainer,
    module: LightningModule,
    levels: Callable[[], Mapping[str, float]],
    event: bool = False,
) -> None:
    """Log levels from ``on_train_batch_end`` if `should_log` says so; they are not computed otherwise.

    Lightning passes on to the loggers, every ``log_every_n_steps``, what its module logged last; an event in
    between goes to the loggers directly, at its own step.
    """
    if should_log(trainer):
        log_levels(module, levels(), on_step=True)
    elif should_log(trainer, event):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the x-axis of `LightningModule.log`
        for logger in trainer.loggers:
            logger.log_metrics(dict(levels()), step=step)


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
        on_step=on_step,
        on_epoch=not on_step,
        batch_size=1,
        # together these reduce nothing, and spare distributed runs Lightning's advice to average
        sync_dist=True,
        rank_zero_only=True,
    )
