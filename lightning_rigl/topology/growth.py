"""What a connection is worth when it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Values = Literal["zeros", "initial", "normal", "uniform", "gradient", "sign"]


@dataclass(frozen=True)
class Growth:
    """The values and the optimizer state of new connections.

    Args:
        values: ``zeros`` (the paper); ``initial``: the layer's initial values, shuffled; ``normal``: N(0, s),
            s the standard deviation of the layer's active weights; ``uniform``: from -m to m, m their mean
            absolute value; ``gradient``: the dense gradient; ``sign``: its sign. In the official code s and m
            are those of all weights of the layer, the inactive of which keep values there; over the zeros
            that they are here, s and m would shrink with the density.
        divisor: what these values are divided by, above 0.
        regrown: give them also to a connection that is dropped and grown again in one update, which
            otherwise keeps its value and its optimizer state.
        momentum: the optimizer's moving average of gradients starts at this multiple of the dense gradient
            (``initial_acc_scale`` of the official code), at least 0; all other state is fresh.

    Raises:
        ValueError: unknown values, or a number out of range.
        TypeError: a value of another type.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, section 3 (4): other values than
        zeros were not better.

    Example:
        >>> Growth("gradient", divisor=-1)
        Traceback (most recent call last):
        ...
        ValueError: growth, divisor: a number above 0, got -1
    """

    values: Values = "zeros"
    divisor: float = 1.0
    regrown: bool = False
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.values not in get_args(Values):
            known = ", ".join(get_args(Values))
            raise ValueError(f"growth: unknown values {self.values!r}; the known ones are {known}")
        for name, value in (("divisor", self.divisor), ("momentum", self.momentum)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"growth, {name}: a number, got {value!r}")
        if not isinstance(self.regrown, bool):
            raise TypeError(f"growth, regrown: True or False, got {self.regrown!r}")
        if not 0 < self.divisor < math.inf:
            raise ValueError(f"growth, divisor: a number above 0, got {self.divisor!r}")
        if not 0 <= self.momentum < math.inf:
            raise ValueError(f"growth, momentum: a number of at least 0, got {self.momentum!r}")

    @property
    def reads_gradient(self) -> bool:
        """Whether the dense gradient decides something here."""
        return self.values in ("gradient", "sign") or self.momentum > 0

    def new_values(
        self,
        weight: Tensor,
        mask: Tensor,
        initial: Tensor | None,
        grad: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Values for all connections of a layer; those of new ones are used. Shape and type of ``weight``.

        Args:
            weight: the values now, zero where inactive.
            mask: bool, True = active now; only for ``normal`` and ``uniform``.
            initial: those at the start, before masking; only for ``initial``.
            grad: the dense gradient; only for ``gradient`` and ``sign``.
            generator: of the random values, on the CPU.
        """
        if self.values == "zeros":
            return torch.zeros_like(weight)
        if self.values in ("gradient", "sign"):
            source = grad if grad is not None else torch.zeros_like(weight)
            return (source.sign() if self.values == "sign" else source) / self.divisor
        if self.values == "initial":
            source = weight if initial is None else initial
            order = torch.randperm(source.numel(), generator=generator).to(source.device)
            return source.reshape(-1)[order].view(source.shape) / self.divisor
        active = weight[mask] if mask.any() else weight.new_zeros(1)
        if self.values == "normal":
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            return noise * active.std(correction=0) / self.divisor
        noise = torch.rand(weight.shape, generator=generator).to(weight)
        return (2 * noise - 1) * active.abs().mean() / self.divisor
