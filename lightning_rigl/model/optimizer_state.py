"""The state of any optimizer, by shape: what it is for a connection that was never active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.compute.backends import NativeBackend
from lightning_rigl.compute.optimizers import ActiveStep, compacted
from lightning_rigl.model import sharding
from lightning_rigl.model.sparse_layer import SparseLayer


@cache
def mixes_coordinates(kind: type[Optimizer]) -> bool:
    """Whether optimizers of this class are known to move weights whose own gradient and state are zero."""
    return any(ancestor.__name__ == "Muon" for ancestor in kind.__mro__)


def gradients_are_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether no gradient that this process holds has a nan or an infinity; reads back from the device."""
    grads = [sharding.local(grad) for grad in gradients if grad is not None]
    # one cheap pass: a finite sum has finite terms; where it is not, it may have overflowed on the way
    wide = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    return all(bool(s.isfinite()) or bool(g.isfinite().all()) for g, s in zip(grads, wide, strict=True))


def reset(optimizer: Optimizer, changed: Mapping[nn.Parameter, Tensor]) -> None:
    """Set the optimizer's state to its fresh value at the changed positions, in place.

    Every floating state tensor of a parameter's shape is reset, whatever its name. ``step`` counters and
    factored statistics have another shape and stay; so does every other position, bitwise.

    Args:
        optimizer: any optimizer that keeps its state in ``optimizer.state[parameter]``.
        changed: parameter -> bool tensor of its shape (of what this process holds), True where it is reset.
    """
    optimizer = _innermost(optimizer)
    if isinstance(optimizer, ActiveStep):
        optimizer.renew(changed)
    for group in optimizer.param_groups:
        members = {p: elementwise(optimizer, p) for p in group["params"] if p in changed}
        fresh = _fresh(optimizer, group, next(iter(members))) if any(members.values()) else {}
        for parameter, state in members.items():
            for key, tensor in state.items():
                sharding.local(tensor).masked_fill_(changed[parameter], fresh.get(key, 0.0))


def widen(optimizer: Optimizer, own: Iterable[SparseLayer]) -> None:
    """Make state of active connections only, as an `ActiveStep` has saved it, dense where steps are dense.

    Exact: the numbers go to their places, and inactive connections get zeros, as they have in a dense run.

    Args:
        optimizer: whose state was loaded.
        own: its layers, with the masks that the state goes with.

    Raises:
        ValueError: the state is of another number of connections; that layer's state has not been changed.
    """
    optimizer = _innermost(optimizer)
    for layer in own:
        product = layer.product
        native = product is not None and isinstance(product.kernels, NativeBackend)
        if native and isinstance(optimizer, ActiveStep):
            continue
        state = optimizer.state.get(layer.parameter, {})
        for key, value in compacted(state, layer.parameter).items():
            if len(value) != layer.count:
                raise ValueError(
                    f"{layer.name}: {key} holds {len(value)} active connections and the mask has "
                    f"{layer.count}; load a checkpoint whose optimizer and callback are of one step, or "
                    "begin with a new optimizer"
                )
            dense = torch.zeros_like(layer.parameter, memory_format=torch.contiguous_format)
            dense[layer.mask] = value
            state[key] = dense


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: Fabric's wrapper has it as ``optimizer``, ZeRO as ``optim``."""
    while isinstance(inner := getattr(optimizer, "optimizer", getattr(optimizer, "optim", None)), Optimizer):
        optimizer = inner
    return optimizer


def elementwise(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state tensors that hold one number for each weight of the parameter."""
    state = {
        k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, Tensor) and k != "step"
    }
    return {k: v for k, v in state.items() if v.shape == parameter.shape and v.is_floating_point()}


def _fresh(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, float]:
    """What one step with a zero gradient makes of the state of a zero weight.

    That is 0 for most optimizers, but the initial accumulator of Adagrad, the step size of Rprop, the eps of
    Adamax. A new optimizer of the same class and settings is asked, so that a user's own is right too.
    """
    probe = nn.Parameter(torch.zeros([1] * parameter.dim(), dtype=parameter.dtype, device=parameter.device))
    probe.grad = torch.zeros_like(probe)
    known = signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    try:
        twin = type(optimizer)([{**group, "params": [probe]}], **settings)
        twin.step()
    except Exception:  # its constructor wants more than settings: 0 is the fresh value of nearly all state
        return {}
    return {key: float(value.reshape(-1)[0]) for key, value in elementwise(twin, probe).items()}
