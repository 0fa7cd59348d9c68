"""CigL: RigL whose active weights are left out at random while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections
from lightning_rigl.methods.rigl import RigL


@dataclass(frozen=True)
class CigL(RigL):
    """Calibrated RigL: a random mask Z over the active weights, drawn anew for each optimizer step.

    A step is W <- W - rate Z dL/dw(Z W): each active connection takes no part in it with probability
    ``drop``. The topology is RigL's, by |W| and the gradient of that step, Z dL/dw(Z W): a connection that is
    left out at an update scores 0 for growth, so that it does not grow again if that update drops it (it has
    taken no part in what the gradient is of). Whatever is validated, saved or tested is W, undisturbed, also
    after an exception inside a step; batches that are accumulated share their Z.

    The other half of the paper is an average of the late weights, which makes it calibrated:
    ``StochasticWeightAveraging`` or ``EMAWeightAveraging`` of Lightning beside `RigLCallback`. The paper
    averages Z W, whose mean is (1 - drop) W; here W is averaged. ``scaled=True`` makes the two agree; so do
    norms whose statistics are collected with the average, as ``StochasticWeightAveraging`` does it.

    Args:
        drop: probability that a connection is left out of a step, in [0, 1).
        scaled: divide what is left by 1 - drop, as the authors' code does; False is the paper's Algorithm 1.

    Raises:
        ValueError: a probability out of range.
        TypeError: a value of another type.

    Reference:
        Lei et al., *Calibrating the Rigged Lottery: Making All Tickets Reliable*, ICLR 2023,
        arXiv:2302.09369.

    Example:
        >>> weight = torch.ones(1000)
        >>> layer = Connections(weight, weight > 0, None, torch.Generator().manual_seed(0))
        >>> factors = CigL(drop=0.1).disturb(layer)
        >>> sorted(set(factors.tolist())), int((factors == 0).sum())
        ([0.0, 1.0], 100)
    """

    drop: float = 0.1
    scaled: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.drop, bool) or not isinstance(self.drop, (int, float)):
            raise TypeError(f"cigl, drop: a number, got {self.drop!r}")
        if not isinstance(self.scaled, bool):
            raise TypeError(f"cigl, scaled: True or False, got {self.scaled!r}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"cigl, drop: a probability in [0, 1), got {self.drop!r}")

    def disturb(self, layer: Connections) -> Tensor:
        """0 for a connection that is left out; 1 where there is none, whose dense gradient is RigL's."""
        left_out = layer.mask & (layer.random() < self.drop)
        factors = torch.ones_like(layer.weight)
        if self.scaled:
            factors.masked_fill_(layer.mask, 1 / (1 - self.drop))
        return factors.masked_fill_(left_out, 0)
