"""DNW: train all weights straight through, use the largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.topology import selection


@dataclass(frozen=True)
class DNW(Method):
    """Discovering neural wirings, also called straight-through top-k.

    Every weight is trained, with the dense gradient of the sparse model; after each step the connections are
    the largest |w| of each layer, as many as the distribution gives it, and the others count as zero until
    they have grown large. Training is dense in memory and in the gradient of the weights; there is no
    schedule, and the optimizer's state is dense and never made fresh.

    Reference:
        Wortsman et al., *Discovering Neural Wirings*, NeurIPS 2019, arXiv:1906.00586, section 2.

    Example:
        >>> DNW().gradient, DNW().latent, DNW().schedule
        ('every_step', True, None)
    """

    gradient = "every_step"
    starts_dense = True  # so that every weight begins at its own value
    latent = True
    schedule = None

    def project(
        self, layers: Sequence[Connections], variables: Sequence[Tensor], moment: Moment
    ) -> list[tuple[Tensor, Tensor]]:
        """The largest |w| of each layer; what is trained is the weight itself."""
        pairs = zip(layers, variables, strict=True)
        masks = [selection.top(w.abs(), layer.target, torch.ones_like(layer.mask)) for layer, w in pairs]
        return list(zip(masks, variables, strict=True))

    def drop_score(self, layer: Connections) -> Tensor:
        """|w|; not asked."""
        return layer.weight.abs()

    def grow_score(self, layer: Connections) -> Tensor:
        """|w|; not asked."""
        return layer.weight.abs()
