"""Measure a training step on a copy without values, so that the real one is left alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_rigl.flops.formulas import CostTable
from lightning_rigl.flops.tracer import Tracer, meta_copy, to_meta
from lightning_rigl.model.layers import named_parameters


def measure_copy(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, samples: int
) -> CostTable | None:
    """The cost of ``training_step`` on a copy of the module and of the batch, both without values.

    The module, the batch and the global random generators are as before; nothing is logged.

    Args:
        trainer: the running trainer; the copy does not see it.
        module: the module that is trained.
        batch: its first batch.
        batch_idx: the index of the batch.
        samples: the number of samples in the batch.

    Returns:
        The cost per sample, or None if the step runs in the real place only: it reads values or the trainer,
        is optimized by hand, draws its own batches or comes in a form that is not copied.
    """
    step = module.training_step
    if samples < 1 or not module.automatic_optimization or "training_step" in vars(module):
        return None  # a step of the instance's own, as torch.compile makes it, does not run on a copy
    with isolate_rng(include_cuda=module.device.type == "cuda"):
        try:
            twin = _twin(trainer, module)
            args = [tree_map(_to_meta, batch)]
            if is_param_in_hook_signature(step, "batch_idx", min_args=2):
                args.append(batch_idx)
            tracer = Tracer(named_parameters(twin))
            with trainer.precision_plugin.train_step_context(), tracer:
                twin.training_step(*args)
        except Exception:  # .item(), a custom kernel, the trainer: a real step is watched instead
            return None
    return tracer.table(samples)


def _twin(trainer: Trainer, module: LightningModule) -> LightningModule:
    """A copy that has no values, no trainer and no voice."""
    data = (v for v in vars(module).values() if isinstance(v, (Dataset, DataLoader, LightningDataModule)))
    twin = meta_copy(module, {id(trainer): None, **{id(value): value for value in data}})
    for name in ("log", "log_dict", "print"):
        setattr(twin, name, _silent)
    return twin.to("meta")


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stands in for the logging methods of the copy."""


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return to_meta(leaf)
    if leaf is None or isinstance(leaf, (str, bytes, int, float)):
        return leaf
    raise TypeError(f"a batch with a {type(leaf).__name__} cannot be copied without values")
