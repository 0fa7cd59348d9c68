"""What a Trainer can do, asked before the model is touched."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.prune import is_pruned
from torch.optim import LBFGS

from lightning_rigl.compute.optimizers import ActiveStep
from lightning_rigl.model.layers import select
from lightning_rigl.model.sparsifier import Sparsifier


def refuse_trainer(trainer: Trainer) -> None:
    """Raise MisconfigurationException for a Trainer, strategy or callback that sparsity cannot run with."""
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"RigLCallback is a callback of lightning.pytorch, this Trainer is {type(trainer).__module__}'s; "
            "take Trainer and LightningModule from lightning.pytorch (pip install lightning), which has the "
            "same names as pytorch_lightning"
        )
    strategy = trainer.strategy
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)) or "XLA" in type(strategy).__name__:
        raise MisconfigurationException(
            f"RigLCallback does not run with {type(strategy).__name__}, which hides the gradient of a layer "
            "from callbacks; use strategy='ddp', or ModelParallelStrategy (FSDP2) for sharded parameters"
        )
    if any(isinstance(callback, ModelPruning) for callback in _callbacks(trainer)):
        raise MisconfigurationException(
            "RigLCallback and ModelPruning both decide which weights are zero; remove one of them"
        )


def refuse_module(module: nn.Module) -> None:
    """Raise MisconfigurationException for a module that torch.nn.utils.prune has masked already."""
    if is_pruned(module):
        pruned = [name for name, _ in module.named_parameters() if name.endswith("_orig")]
        raise MisconfigurationException(
            f"{', '.join(pruned[:5])}: pruned by torch.nn.utils.prune, which computes the weight anew in "
            "each forward pass; call torch.nn.utils.prune.remove(layer, 'weight'), start with init='nonzero'"
        )


def refuse_optimizers(trainer: Trainer) -> None:
    """Raise MisconfigurationException for an optimizer whose state cannot follow a mask."""
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "RigLCallback does not work with LBFGS: its history mixes all weights, and it evaluates several "
            "gradients a step; use a first-order optimizer such as SGD or AdamW"
        )
    if _has_sparse_gradients(trainer):
        for what, reason in (
            (trainer.gradient_clip_val, f"gradient_clip_val={trainer.gradient_clip_val}"),
            (trainer.world_size > 1, f"{trainer.world_size} processes"),
        ):
            if what:
                raise MisconfigurationException(
                    f"active_gradients=True makes sparse gradients, and torch cannot do this with them: "
                    f"{reason}; leave active_gradients out"
                )


def known_cause(trainer: Trainer, exception: BaseException) -> str | None:
    """What to say of an exception that comes from sparse gradients, in torch's words; None of any other."""
    if "SparseCPU" not in str(exception) or not _has_sparse_gradients(trainer):
        return None
    return (
        "active_gradients=True makes sparse gradients, and torch cannot do all with them, as clipping in "
        "manual optimization (clip_gradients, torch.nn.utils.clip_grad_norm_); leave active_gradients out"
    )


def refuse_shared(
    trainer: Trainer, module: LightningModule, include: list[str] | None, exclude: list[str] | None
) -> None:
    """Raise MisconfigurationException for a sparse parameter of two optimizers: which step is its own?"""
    for name, parameter in select(module, include, exclude).items():
        places = [
            str(index)
            for index, optimizer in enumerate(trainer.optimizers)
            if any(p is parameter for group in optimizer.param_groups for p in group["params"])
        ]
        if len(places) > 1:
            raise MisconfigurationException(
                f"{name} belongs to the optimizers {' and '.join(places)}, and the topology of a layer "
                "follows the steps of one; give it to one optimizer, exclude it, or take method='static'"
            )


def refuse_stale_masks(sparsifier: Sparsifier) -> None:
    """Raise MisconfigurationException if the weights have changed without the masks."""
    if sparsifier.layers.has_strays() and not sparsifier.mixing:
        raise MisconfigurationException(
            "the weights have connections that the masks here do not: they have been loaded, or trained by "
            "processes that ddp_fork, ddp_spawn or ddp_notebook started, which keep their masks; "
            "load_masks(trainer.checkpoint_callback.best_model_path) reads those of a checkpoint, and a new "
            "RigLCallback(init=<checkpoint>) goes on with them"
        )


def concerns(trainer: Trainer) -> Iterator[str]:
    """What works, but not as its user may think."""
    if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
        yield (
            "a checkpoint callback has save_weights_only=True: its checkpoints hold no masks, and no run can "
            "be resumed from them; init='nonzero' takes the weights that are not zero, which are fewer than "
            "the active connections just after an update"
        )
    if any(isinstance(callback, LearningRateFinder) for callback in _callbacks(trainer)):
        yield "LearningRateFinder searches without other callbacks: its rate is that of the dense model"


def trained_before(
    module: LightningModule, include: list[str] | None, exclude: list[str] | None, dense_checkpoint: bool
) -> str | None:
    """What to say of random masks on weights that are no first ones; None if nothing shows that."""
    sign = "the checkpoint has no masks" if dense_checkpoint else _sign_of_training(module, include, exclude)
    return sign and (
        f"the model has been trained before ({sign}), and random masks discard most of it; "
        "init='magnitude' keeps the largest weights, 'nonzero' or a checkpoint those of a sparse run"
    )


def _sign_of_training(
    module: LightningModule, include: list[str] | None, exclude: list[str] | None
) -> str | None:
    for name, parameter in select(module, include, exclude).items():
        zero = (parameter.detach() == 0).flatten(1)
        zeros = int((zero & ~zero.all(1, keepdim=True)).sum())  # a whole row is an embedding's padding
        if zeros / parameter.numel() > 0.05:
            return f"{name} has {zeros:,} zeros"
    for name, layer in module.named_modules():
        batches = layer.num_batches_tracked if isinstance(layer, _NormBase) else None
        if batches is not None and batches > 0:
            return f"{name} has the statistics of {int(batches):,} batches"
        if (
            isinstance(layer, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
            and layer.weight is not None
        ):
            scale = layer.weight.detach()
            if (scale != scale.flatten()[0]).any():
                return f"{name}.weight differs from its first value"
    return None


def _has_sparse_gradients(trainer: Trainer) -> bool:
    return any(isinstance(it, ActiveStep) and it.active_gradients for it in trainer.optimizers)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector
