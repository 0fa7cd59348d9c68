"""Averages of gradients: over steps, and over the active connections of a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def moving_average(old: Tensor | None, new: Tensor, beta: float) -> Tensor:
    """An exponential average: beta x old + (1 - beta) x new, without bias correction.

    Args:
        old: the average so far; None is zero.
        new: what comes in, of the same shape. If a value of it is not finite, as after an overflow in mixed
            precision, the average stays as it is; no device but the CPU is asked.
        beta: weight of the past, in [0, 1).

    Returns:
        A new tensor; ``old`` is not changed.

    Example:
        >>> moving_average(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
        tensor([0.5000, 1.0000])
    """
    past = torch.zeros_like(new) if old is None else old
    finite = torch.stack(torch.aminmax(new)).isfinite().all() if new.numel() else torch.tensor(True)
    if new.is_cpu:  # it can be asked, and a pass over the layer is spared
        return torch.lerp(past, new, 1 - beta) if finite else past.clone()
    return torch.lerp(past, torch.where(finite, new, past), 1 - beta)


def mean_magnitude(values: Tensor | None, mask: Tensor) -> float:
    """Mean absolute value over the True of ``mask``, summed in double precision; 0 without any.

    Example:
        >>> mean_magnitude(torch.tensor([1.0, -3.0, 8.0]), torch.tensor([True, True, False]))
        2.0
    """
    chosen = mask.new_zeros(0) if values is None else values[mask]
    return float(chosen.abs().mean(dtype=torch.float64)) if chosen.numel() else 0.0


def check_beta(beta: object, method: str) -> None:
    """Raise unless ``beta`` is a number in [0, 1)."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"method {method}, momentum: a number, got {beta!r}")
    if not 0 <= beta < 1:
        raise ValueError(f"method {method}, momentum: the weight of the past, in [0, 1), got {beta!r}")
