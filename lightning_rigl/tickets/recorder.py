"""The callback of one round: it keeps what later rounds and an interrupted run go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_rigl.callbacks.clock import training_length
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.model import layers
from lightning_rigl.tickets.folder import FORMAT, Folder, write_json, write_tensors


class Recorder(Checkpoint):
    """Writes the checkpoints of one round.

    Args:
        folder: where.
        index: of the round; the first one keeps the training before its first step and after step k, too.
        settings: of the run, for `Folder.check`.
        save_every: optimizer steps from one ``last.ckpt`` to the next; None is an epoch.
    """

    def __init__(
        self, folder: Folder, index: int, settings: Mapping[str, Any], save_every: int | None
    ) -> None:
        self.folder, self.index, self.settings, self.save_every = folder, index, dict(settings), save_every
        self._step = 0  # k, to which the weights are rewound
        self._kept = True  # whether rewind.ckpt is there, or not wanted
        self._saved = 0  # the step of last.ckpt

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is written."""
        refuse_trainer(trainer)
        known = layers.named_parameters(pl_module).items()
        shapes = {n: None if nn.parameter.is_lazy(p) else list(p.shape) for n, p in known}
        later = any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
        self.folder.check_parameters(shapes, complete=not later)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve step k; keep the training before its first step, in the first round."""
        refuse_schedulers(trainer)
        known, length = self.folder.read_settings(), training_length(trainer, trainer.max_epochs)
        self.folder.check({"length": length})
        by_hand = not pl_module.automatic_optimization  # then the length is in batches
        rewind = self.settings["rewind"]
        self._step = known["step"] if known else rewind_step(rewind, None if by_hand else length)
        self._saved = trainer.global_step
        loop = trainer.fit_loop
        if loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch:
            loop.reset_restart_stage()  # else Lightning does not count the epoch that begins now
        if self.index:
            return
        self._kept = self._step == 0 or self.folder.rewind.exists()
        if not known:
            self._keep(trainer, self.folder.first)
        if trainer.is_global_zero and not known:
            shapes = {n: list(p.shape) for n, p in layers.named_parameters(pl_module).items()}
            made = {**self.settings, "step": self._step, "length": length, "parameters": shapes}
            write_json({"format": FORMAT, **made}, self.folder.settings)
        trainer.strategy.barrier()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the training after step k, and every few steps if asked to."""
        if trainer.max_steps != -1 or not trainer.is_last_batch:
            self._batch_over(trainer, trainer.is_last_batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same after the last batch of an epoch.

        A training that is limited by epochs would count this one twice if it went on from its last batch; one
        that is limited by steps would if it went on from here.
        """
        if trainer.max_steps == -1:
            self._batch_over(trainer, True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the result; from here on the round is finished."""
        if not self._kept:
            raise MisconfigurationException(
                f"rewind: training ended after {trainer.global_step} optimizer steps, before step "
                f"{self._step}; rewind to an earlier one"
            )
        self._save(trainer, self.folder.file(self.index, "end.ckpt"))
        if trainer.is_global_zero:
            masks = _rigl(trainer).masks.values()
            result = {
                "active": sum(int(mask.count_nonzero()) for mask in masks),
                "size": sum(mask.numel() for mask in masks),
                "steps": trainer.global_step - (self._step if self.index else 0),
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            }
            write_json(result, self.folder.file(self.index, "end.json"))
            for name in ("last.ckpt", "start.ckpt"):
                self.folder.file(self.index, name).unlink(missing_ok=True)
        trainer.strategy.barrier()

    def _batch_over(self, trainer: Trainer, epoch_over: bool) -> None:
        step = trainer.global_step
        if not self._kept and step >= self._step:
            if step > self._step:
                raise MisconfigurationException(
                    f"rewind: no batch ends after exactly {self._step} optimizer steps, the next one ends "
                    f"after {step}; rewind to a step at which one does"
                )
            self._keep(trainer, self.folder.rewind)
            self._kept = True
        if step >= self._saved + self.save_every if self.save_every else epoch_over:
            self._save_last(trainer, epoch_over)

    def _save_last(self, trainer: Trainer, epoch_over: bool) -> None:
        """Keep a training that goes on; Lightning does not start one in which nothing is left to do."""
        self._saved = trainer.global_step
        last_epoch = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
        last_step = 0 < trainer.max_steps <= trainer.global_step
        if not (last_step or trainer.should_stop or (last_epoch and epoch_over)):
            self._save(trainer, self.folder.file(self.index, "last.ckpt"))

    def _keep(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint that later rounds begin with; their callbacks begin anew."""
        beside = path.with_name(f"{path.name}.whole")
        self._save(trainer, beside)
        if trainer.is_global_zero:
            try:
                content = torch.load(beside, map_location="cpu", weights_only=True)
            except Exception as error:
                raise MisconfigurationException(
                    f"the checkpoint of {type(trainer.lightning_module).__name__} cannot be loaded again, so "
                    f"no round could go on from it; save plain types, as hyperparameters too: {error}"
                ) from error
            finally:
                beside.unlink()
            write_tensors({**content, "callbacks": {}}, path)
        trainer.strategy.barrier()

    def _save(self, trainer: Trainer, path: Path) -> None:
        """All processes save; the file appears when it is complete."""
        beside = path.with_name(f"{path.name}.new")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, path)
        trainer.strategy.barrier()


def rewind_step(rewind: str | int | float, length: int | None) -> int:
    """Step k, to which the weights of the first round are rewound; 0 is the initialisation.

    Args:
        rewind: ``init`` or ``learning_rate``, a step, or a fraction of training in (0, 1).
        length: of training in optimizer steps; None if unknown.

    Raises:
        MisconfigurationException: k is not before the end, or a fraction of an unknown length or of less than
            one step.

    Example:
        >>> rewind_step("init", 500), rewind_step(20, 500), rewind_step(0.05, 500)
        (0, 20, 25)
    """
    if isinstance(rewind, str):
        return 0
    if isinstance(rewind, float) and length is None:
        raise MisconfigurationException(
            f"rewind={rewind}, a fraction of training, whose optimizer steps nobody knows; give a step"
        )
    step = int(rewind * (length or 0)) if isinstance(rewind, float) else rewind
    if isinstance(rewind, float) and not step:
        raise MisconfigurationException(
            f"rewind={rewind}: training has {length} steps, and this share of them is none; give a step, or "
            "rewind='init' for the initialisation"
        )
    if length is not None and step >= length:
        raise MisconfigurationException(
            f"rewind={rewind}: training has {length} steps, and nothing would be left to train; give a step "
            f"below {length}"
        )
    return step


def refuse_trainer(trainer: Trainer) -> None:
    """Raise MisconfigurationException for a Trainer whose checkpoints tickets cannot be made from."""
    trial: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    if trial:
        raise MisconfigurationException(
            "fast_dev_run: a trial would leave its tickets in the folder; take max_steps, and another folder"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "lottery tickets need whole checkpoints, ModelParallelStrategy writes shards; use strategy='ddp'"
        )
    if any(isinstance(callback, WeightAveraging) for callback in _callbacks(trainer)):
        raise MisconfigurationException(
            "WeightAveraging trains other weights than its checkpoints show, and these are what is pruned "
            "and rewound; train the tickets without it"
        )


def refuse_schedulers(trainer: Trainer) -> None:
    """Raise MisconfigurationException for a scheduler that is stepped after its checkpoint."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} follows a metric: Lightning steps it after the "
                "checkpoint of an epoch is written, and a round that goes on from there would lose that "
                "step; take a scheduler that follows steps or epochs, such as CosineAnnealingLR"
            )


def _rigl(trainer: Trainer) -> RigLCallback:
    return next(callback for callback in _callbacks(trainer) if isinstance(callback, RigLCallback))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector
