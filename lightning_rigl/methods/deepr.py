"""DEEP R: a random walk of the weights, and a new connection at random for each that changes its sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.schedules import UpdateSchedule


@dataclass(frozen=True)
class DeepR(Method):
    """Deep rewiring.

    A connection has a sign s and a strength theta >= 0, w = s theta. After each optimizer step with learning
    rate eta, theta loses eta x l1 and a normal number of variance 2 eta T is added. A connection whose theta
    is then below 0 is dropped, and another, chosen uniformly from all that are not active, takes its place;
    it begins at 0 with a random sign. The number of connections of each layer is constant.

    A strength of exactly 0 is active, as in the paper: a new connection lives through the step that made it,
    and the next step decides, by the sign of its first move, whether it stays. Signs of first connections are
    those of their weights. A connection that changes its sign while no update is due, or in a layer without
    free places, begins again at 0 in its own place with a new random sign.

    Made for its own schedule: an update after every step of training. Others make it rewire less, and with
    policy ``skip_step`` not at all; the drop fraction has no say.

    Args:
        l1: strength lost per unit of learning rate, at least 0 (alpha).
        temperature: of the random walk, at least 0 (T); 0 is no noise. The comparison in the paper of `DSR`
            takes it from 1e-5 down to 1e-15 as training goes on, the authors' MNIST script is at 2.5e-11.

    Raises:
        ValueError: a number out of range.

    Reference:
        Bellec et al., *Deep Rewiring: Training very sparse deep networks*, ICLR 2018, arXiv:1711.05136,
        algorithm 1.

    Example:
        >>> DeepR().gradient, DeepR().schedule.every, DeepR().schedule.policy
        ('never', 1, 'after_step')
    """

    l1: float = 1e-5
    temperature: float = 1e-8

    schedule = UpdateSchedule(
        every=1, drop_fraction=1.0, decay="constant", begin=0, end=1.0, policy="after_step"
    )

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("temperature", self.temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"method deepr, {name}: a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"method deepr, {name}: a number of at least 0, got {value!r}")

    def observe(self, layer: Connections, moment: Moment) -> None:
        """Give connections without a sign that of their weight, or a random one where that is 0."""
        sign = layer.notes.get("sign", torch.zeros_like(layer.mask, dtype=torch.int8))
        coin = torch.rand(layer.weight.shape, generator=_stream(layer, 1)) < 0.5
        drawn = torch.where(coin.to(layer.weight.device), 1, -1)
        begun = torch.where(layer.weight == 0, drawn, layer.weight.sign()).to(torch.int8)
        layer.notes["sign"] = torch.where(layer.mask & (sign == 0), begun, sign)

    def settle(self, layer: Connections, moment: Moment) -> Tensor:
        """L1 and noise; what has changed its sign becomes 0 and has none."""
        weight = layer.weight
        sign = layer.notes["sign"].to(weight)
        moved = weight - moment.rate * self.l1 * sign
        if self.temperature:
            noise = torch.randn(weight.shape, generator=_stream(layer, 2)).to(weight)
            moved = moved + math.sqrt(2 * moment.rate * self.temperature) * noise
        alive = layer.mask & ~(moved * sign < 0)
        layer.notes["sign"] = layer.notes["sign"].where(alive, 0)
        return torch.where(alive, moved, 0)

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """As many as have no sign, in a layer with free places."""
        lost = [int((layer.mask & (layer.notes["sign"] == 0)).count_nonzero()) for layer in layers]
        return [(0 if x.mask.all() else count,) * 2 for x, count in zip(layers, lost, strict=True)]

    def drop_score(self, layer: Connections) -> Tensor:
        """1 with a sign, 0 without."""
        return layer.notes["sign"].abs().to(layer.weight.dtype)

    def grow_score(self, layer: Connections) -> Tensor:
        """Uniform random numbers."""
        return layer.random()


def _stream(layer: Connections, number: int) -> torch.Generator:
    """Randomness beside that of `Connections.random`, so that signs, noise and places are independent."""
    return torch.Generator().manual_seed(layer.generator.initial_seed() + number)
