"""What some methods see before the first step: a copy of the module, and the first batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_rigl.callbacks.twins import left_out, silenced
from lightning_rigl.model.sparsifier import Sparsifier


def first_look(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, sparsifier: Sparsifier
) -> None:
    """Let the method score all connections on the first batch, if it does so and has not done it yet.

    The step runs on a copy that sees no trainer and logs nothing. The module, its gradients and statistics,
    the batch and the random generators are as before; FLOPs are not counted.

    Args:
        trainer: the running trainer.
        module: the module that is trained.
        batch: its first batch, on its device.
        batch_idx: the index of the batch.
        sparsifier: of the module.

    Raises:
        MisconfigurationException: the module cannot be copied, or the method asks for a loss and
            ``training_step`` gives none on a copy without a trainer.
        ValueError: the method cannot score this model.
    """
    if not sparsifier.needs_look:
        return
    name = type(sparsifier.method).__name__
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    with isolate_rng(include_cuda=module.device.type == "cuda"), _disable_current_modes():
        twin = copied(trainer, module, f"{name} scores a copy of the module, which has none")
        failed = f"{name} scores by the loss of the first batch, of which training_step gives none on a copy"
        sparsifier.look(
            lambda model: loss_of(trainer, model, batch, batch_idx, failed), next(leaves, None), twin
        )


def copied(trainer: Trainer, module: LightningModule, failed: str) -> LightningModule:
    """A copy of the module with its values, without a trainer and a voice.

    Raises:
        MisconfigurationException: it cannot be copied; ``failed`` says for what it is needed.
    """
    return cast(LightningModule, _told(lambda: _twin(trainer, module), failed))


def loss_of(trainer: Trainer, twin: nn.Module, batch: Any, batch_idx: int, failed: str) -> Tensor:
    """The loss of a training step on such a copy.

    Raises:
        MisconfigurationException: there is none; ``failed`` says for what it is needed.
    """
    return cast(Tensor, _told(lambda: _loss(trainer, twin, batch, batch_idx), failed))


def _told(attempt: Callable[[], Any], failed: str) -> Any:
    try:
        return attempt()
    except Exception as error:
        raise MisconfigurationException(
            f"{failed}: {error}; let the step do without self.trainer and optimize automatically, or leave "
            "out what asks for a copy: a method such as snip needs none"
        ) from error


def _twin(trainer: Trainer, module: LightningModule) -> LightningModule:
    """A copy with values that has no trainer, no voice and nothing compiled."""
    compiled = getattr(module, "_compiler_ctx", None)
    memo = left_out(trainer, module)
    twin = copy.deepcopy(module, memo if compiled is None else {**memo, id(compiled): None})
    for name in ("forward", "training_step", "validation_step") if compiled else ():
        vars(twin).pop(name, None)  # compiled, and bound to the module itself
    return silenced(twin)


def _loss(trainer: Trainer, twin: Any, batch: Any, batch_idx: int) -> Tensor:
    if not twin.automatic_optimization:
        raise TypeError("it optimizes by hand")
    arguments = [copy.deepcopy(batch)]
    if is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    with trainer.precision_plugin.train_step_context():
        outputs = twin.training_step(*arguments)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise TypeError(f"it gives {type(loss).__name__}")
    return loss
