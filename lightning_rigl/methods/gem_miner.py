"""Gem-Miner: scores on frozen weights are rounded to a mask, and the lowest are frozen away step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.overall import freeze, highest
from lightning_rigl.topology.schedules import UpdateSchedule

SCORE = "variable"  # where the engine keeps what is trained
_SWITCHES = (("revive", (bool,), "True or False"), ("inverted", (bool,), "True or False"))


@dataclass(frozen=True)
class GemMiner(Method):
    """Search for a ticket among the initial weights, which are never trained.

    What the optimizer trains are scores p in [0, 1], uniform at first. A connection is active if its flag is
    set and p > 1/2; it holds its initial weight w. The gradient goes straight through the rounding, and a
    penalty makes scores small: dL/dp = dL/dw w + 2 penalty p. Each step ends with a clip to [0, 1].

    At an update the flags of the lowest scores are cleared for good, over all layers together: of those left,
    the share 1 - d^(a - b) with the target density d and the progress a of this and b of the last update. At
    progress a at most the share d^a of all flags is left; at the schedule's last update exactly the target.
    The first update (progress 0) clears none: with ``begin=0``, the default, K + 1 updates are K freezes.
    Then train the ticket from its initial weights, in a second fit with a new callback:
    ``RigLCallback(method="static", init="nonzero")``.

    The optimizer's settings are those of the scores: its weight decay is one more penalty. Other parameters
    are trained as ever; the paper has none. A layer can lose all its connections.

    Args:
        penalty: lambda of the paper, at least 0; 1e-8 (half of the weights) to 1e-4 (1 %) there.
        norm: of the penalty: ``l2``, lambda sum p^2, or ``l1``, lambda sum p.
        revive: all that are flagged after the last update are active: the target count; False: p > 1/2.
        inverted: clear the highest scores instead; a control, not a method.

    Reference:
        Sreenivasan et al., *Rare Gems: Finding Lottery Tickets at Initialization*, NeurIPS 2022, 2202.12002.

    Example:
        >>> GemMiner(penalty=3e-5).schedule.policy
        'after_step'
    """

    penalty: float = 1e-5
    norm: Literal["l2", "l1"] = "l2"
    revive: bool = True
    inverted: bool = False

    gradient = "every_step"
    starts_dense = True
    scope = "model"
    latent = True
    schedule = UpdateSchedule(every=100, begin=0, end=1.0, policy="after_step")

    def __post_init__(self) -> None:
        for name, kinds, words in (("penalty", (int, float), "a number"), *_SWITCHES):
            if type(getattr(self, name)) not in kinds:
                raise TypeError(f"gemminer, {name}: {words}, got {getattr(self, name)!r}")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"gemminer, penalty: a number of at least 0, got {self.penalty!r}")
        if self.norm not in ("l2", "l1"):
            raise ValueError(f"gemminer, norm: unknown name {self.norm!r}; the known ones are l2, l1")

    def planned(self, size: int, target: int, progress: float) -> int:
        """The flags left if each layer cleared its own share; more than are active before the last update."""
        return target if progress >= 1 else math.ceil(size * (target / size) ** progress)

    def drop_score(self, layer: Connections) -> Tensor:
        """p, or -p if inverted."""
        return -layer.notes[SCORE] if self.inverted else layer.notes[SCORE]

    def grow_score(self, layer: Connections) -> Tensor:
        """The flags: nothing grows outside them."""
        return layer.notes["flag"].float()

    def begin(self, layer: Connections) -> Tensor:
        """The first scores; masks that are given (``init``) are the flags, and scores there above 1/2."""
        layer.notes.update(weight=layer.weight.clone(), flag=layer.mask.clone())
        layer.notes["progress"] = torch.zeros((), dtype=torch.float64)
        scores = layer.random().to(layer.weight.dtype)
        return scores if layer.mask.all() else 1 - scores / 4

    def pull(self, layer: Connections, variable: Tensor) -> Tensor:
        """dL/dw w and the slope of the penalty; none where the flag is cleared."""
        slope = 2 * variable if self.norm == "l2" else variable.sign()
        grad = layer.dense_grad() * layer.notes["weight"] + self.penalty * slope
        return grad.masked_fill(~layer.notes["flag"], 0)

    def project(
        self, layers: Sequence[Connections], variables: Sequence[Tensor], moment: Moment
    ) -> list[tuple[Tensor, Tensor]]:
        """Clip the scores, clear flags if an update is due, round; the initial weights."""
        for score in variables:
            score.clamp_(0, 1)
        if moment.due and layers:
            self._clear(layers, moment.progress)
        notes = [layer.notes for layer in layers]
        over = bool(notes) and self.revive and float(notes[0]["progress"]) >= 1
        pairs = zip(notes, variables, strict=True)
        return [(own["flag"] & ((score > 0.5) | over), own["weight"]) for own, score in pairs]

    def _clear(self, layers: Sequence[Connections], progress: float) -> None:
        """Clear the flags that an update at this progress clears."""
        flags = [layer.notes["flag"] for layer in layers]
        left, size = sum(int(flag.count_nonzero()) for flag in flags), sum(flag.numel() for flag in flags)
        target, before = sum(layer.target for layer in layers), float(layers[0].notes["progress"])
        kept = left - freeze(left, size, target, before, progress)
        for layer, part in zip(layers, highest([*map(self.drop_score, layers)], flags, kept), strict=True):
            layer.notes["flag"].copy_(part)
            layer.notes["progress"].clamp_(min=progress)
