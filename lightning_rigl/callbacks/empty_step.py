"""A step without gradients: what Lightning and torch would stumble over."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from torch.amp import GradScaler
from torch.optim import Optimizer


class EmptyStep:
    """Prepares the Trainer for an optimizer step whose gradients are dropped, and puts it right again."""

    def __init__(self) -> None:
        self.backward = False  # took place in this batch
        self._plugin: Precision | None = None  # that clips nothing at present

    def scaler(self, trainer: Trainer, optimizer: Optimizer) -> GradScaler | None:
        """The scaler that must see the gradients before they are dropped: a fused optimizer unscales them."""
        scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        steps = self.backward or not trainer.lightning_module.automatic_optimization  # else it is not asked
        return scaler if steps and getattr(optimizer, "_step_supports_amp_scaling", False) else None

    def leave_unclipped(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Clip nothing if there is nothing to clip: by value, torch fails then."""
        if not _has_gradient(optimizer):
            self._plugin = trainer.precision_plugin
            self._plugin.clip_grad_by_value = _nothing  # type: ignore[assignment, method-assign]  # here only

    def over(self, trainer: Trainer) -> None:
        """Leave the trainer as it was."""
        self.backward = False
        if self._plugin is not None:
            vars(self._plugin).pop("clip_grad_by_value", None)
            self._plugin = None


def _nothing(*arguments: Any) -> None:
    """Stands in for clipping."""


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
