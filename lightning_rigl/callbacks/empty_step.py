"""A step without gradients: what Lightning and torch would stumble over."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.amp import GradScaler
from torch.optim import Optimizer


class EmptyStep:
    """Prepares the Trainer for an optimizer step whose gradients are dropped, and puts it right again."""

    def __init__(self) -> None:
        self.backward = False  # took place in this batch
        self._clip: int | float | None = None  # the trainer's, while there is no gradient to clip

    def scaler(self, trainer: Trainer, optimizer: Optimizer) -> GradScaler | None:
        """The scaler that must see the gradients before they are dropped: a fused optimizer unscales them."""
        scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        steps = self.backward or not trainer.lightning_module.automatic_optimization  # else it is not asked
        return scaler if steps and getattr(optimizer, "_step_supports_amp_scaling", False) else None

    def leave_unclipped(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Clip nothing if there is nothing to clip: by value, torch fails then."""
        if trainer.gradient_clip_val and not _has_gradient(optimizer):
            self._clip, trainer.gradient_clip_val = trainer.gradient_clip_val, 0

    def over(self, trainer: Trainer) -> None:
        """Leave the trainer as it was."""
        self.backward = False
        if self._clip is not None:
            trainer.gradient_clip_val, self._clip = self._clip, None


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
