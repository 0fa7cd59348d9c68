"""A model's copy for inference, free of what surrounds a model in training."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without the wrappers of compilation and parallel training, or a trainer.

    Parametrizations are carried out and dropped: a weight under ``weight_norm`` is then an ordinary weight.

    Raises:
        TypeError: no module.
        ValueError: the model cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = _unwrapped(model)
    owners = [vars(m).get(name) for m in model.modules() for name in ("_trainer", "_fabric")]
    try:
        twin = copy.deepcopy(model, {id(owner): None for owner in owners if owner is not None}).eval()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): make what "
            "torch.nn.utils.prune has left permanent (prune.remove), drop attributes that hold activations"
        ) from error
    for module in list(twin.modules()):
        if is_parametrized(module):
            _carry_out_parametrizations(module)
    return twin


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # torch.compile
            model = inner
        else:
            return model


def _carry_out_parametrizations(module: Any) -> None:
    """As torch's own removal, which would take the property from the original too: copies share its class."""
    values = {name: getattr(module, name).detach() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.clone()))
