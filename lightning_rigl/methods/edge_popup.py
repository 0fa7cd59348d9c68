"""Edge-popup: a score for each frozen weight, and the connections of largest |score| are active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology.overall import highest

SCORE = "variable"  # where the engine keeps what is trained


@dataclass(frozen=True)
class EdgePopup(Method):
    """Search for a good subnetwork of the initial weights, which are never trained.

    What the optimizer trains are scores s. After each step the connections of largest |s| are active, in each
    layer as many as the distribution gives it, and hold their initial weights w. The gradient goes straight
    through the choice: dL/ds = dL/dw w sign(s), the sign because |s| is what is ranked. Scores start uniform
    in -b .. b, b = 1/sqrt(fan in), from the layer's own generator. Masks that are given (``init``) stay.

    The optimizer's settings are those of the scores: its weight decay pulls these to 0. All other parameters
    are trained as ever; the paper has no biases, and norms without weights.

    Reference:
        Ramanujan et al., *What's Hidden in a Randomly Weighted Neural Network?*, CVPR 2020, arXiv:1911.13299.

    Example:
        >>> import torch
        >>> from lightning_rigl import Sparsifier
        >>> layer = torch.nn.Linear(4, 2)
        >>> weight = layer.weight.detach().clone()
        >>> mask = Sparsifier(layer, 0.5, EdgePopup(), seed=0).masks["weight"]
        >>> int(mask.sum()), torch.equal(layer.weight, weight * mask)
        (4, True)
    """

    gradient = "every_step"
    starts_dense = True
    latent = True
    schedule = None

    def drop_score(self, layer: Connections) -> Tensor:
        """|s|."""
        return layer.notes[SCORE].abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|s|."""
        return layer.notes[SCORE].abs()

    def begin(self, layer: Connections) -> Tensor:
        """The first scores; the weights, and where connections may be, are noted."""
        layer.notes.update(weight=layer.weight.clone(), allowed=layer.mask.clone())
        uniform = 2 * layer.random() - 1
        fan_in = layer.weight.numel() // layer.weight.shape[0]
        return (uniform / math.sqrt(fan_in)).to(layer.weight.dtype)

    def pull(self, layer: Connections, variable: Tensor) -> Tensor:
        """dL/dw w sign(s)."""
        return layer.dense_grad() * layer.notes["weight"] * variable.sign()

    def project(
        self, layers: Sequence[Connections], variables: Sequence[Tensor], moment: Moment
    ) -> list[tuple[Tensor, Tensor]]:
        """The connections of largest |s|, counted over the layers that are seen together; initial weights."""
        allowed, count = [layer.notes["allowed"] for layer in layers], sum(layer.target for layer in layers)
        masks = highest([score.abs() for score in variables], allowed, count)
        return [(mask, layer.notes["weight"]) for mask, layer in zip(masks, layers, strict=True)]


@dataclass(frozen=True)
class GlobalEdgePopup(EdgePopup):
    """Edge-popup with one ranking over all layers: these share the target counts of the distribution.

    A layer can lose all its connections.

    Reference:
        Sreenivasan et al., *Rare Gems: Finding Lottery Tickets at Initialization*, NeurIPS 2022,
        arXiv:2202.12002, table 3.

    Example:
        >>> GlobalEdgePopup().scope
        'model'
    """

    scope = "model"
