"""A step without values, on a copy: the real one is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_rigl.callbacks.twins import left_out, silenced, told_the_time
from lightning_rigl.flops.costs import CostTable
from lightning_rigl.flops.meta import meta_copy, to_meta
from lightning_rigl.flops.tracer import Tracer
from lightning_rigl.model.layers import named_parameters


def measure_copy(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    batch_idx: int,
    samples: int,
    stage: str = "training_step",
) -> CostTable | None:
    """The cost of a step on a copy of the module and of the batch, both without values.

    The module, the batch and the global random generators are as before; nothing is logged.

    Args:
        trainer: the running trainer; the copy does not see it.
        module: the module that is trained.
        batch: its first batch.
        batch_idx: the index of the batch.
        samples: the number of samples in the batch.
        stage: ``training_step``, with its backward pass, or ``validation_step``, in the mode of the module.

    Returns:
        The cost per sample, or None if the step runs in the real place only: it reads values or the trainer,
        is optimized by hand, draws its own batches, or a copy would share a function with the original.
    """
    training, step = stage == "training_step", getattr(module, stage)
    if samples < 1 or (training and not module.automatic_optimization) or _is_shared(module, stage):
        return None
    with isolate_rng(include_cuda=module.device.type == "cuda"):
        try:
            twin = silenced(meta_copy(module, left_out(trainer, module)))
            twin = told_the_time(twin, trainer).to("meta")
            args = [tree_map(_to_meta, batch)]
            for name, value, place in (("batch_idx", batch_idx, 2), ("dataloader_idx", 0, 3)):
                if is_param_in_hook_signature(step, name, min_args=place):
                    args.append(value)
            tracer = Tracer(named_parameters(twin), twin.buffers(), inference=not training)
            context = trainer.precision_plugin.train_step_context()
            with context, tracer, torch.set_grad_enabled(training):
                loss = getattr(twin, stage)(*args)
                if training:
                    _backward(loss)
        except Exception:  # .item(), a custom kernel, the trainer: a real step is watched instead
            return None
    return tracer.table(samples)


def _is_shared(module: nn.Module, stage: str) -> bool:
    """Whether a copy would call what the original calls.

    That is a step of the instance's own, as torch.compile makes it, or a hook that is a plain function.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for m in module.modules() for kind in kinds for hook in getattr(m, kind).values())
    return stage in vars(module) or any(isinstance(hook, FunctionType) for hook in hooks)


def _backward(outputs: Any) -> None:
    """Run the backward pass, for what activation checkpointing repeats in it."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return to_meta(leaf)
    if leaf is None or isinstance(leaf, (str, bytes, int, float)):
        return leaf
    raise TypeError(f"a batch with a {type(leaf).__name__} cannot be copied without values")
