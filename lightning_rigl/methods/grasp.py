"""GraSP: prune once, before training, and keep what carries the gradient flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_rigl.methods.base import Probe, ScoredOnce


@dataclass(frozen=True)
class GraSP(ScoredOnce):
    """Gradient signal preservation.

    Before the first step all connections are scored by w (H g), with the gradient g of the first batch's loss
    and its Hessian H, both of the sparse parameters: half of what the squared norm of the gradient loses, to
    first order, with the connection. The lowest of all layers together are dropped, in place of step 0: the
    distribution decides how many connections there are, not where, and a layer may lose all of its own.

    The loss is that of training and must have a second derivative. The authors divide the logits by 200 and
    draw as many samples of each class; here the first batch is what it is, and should hold all classes. In a
    distributed run the scores of the processes' batches are averaged. In a plain loop call
    `Sparsifier.look`.

    Reference:
        Wang et al., *Picking Winning Tickets Before Training by Preserving Gradient Flow*, ICLR 2020,
        arXiv:2002.07376; their score is -w (H g), of which the highest are removed.

    Example:
        L = a^2 b / 2 at a = 2, b = 1 has g = (2, 2), H g = (6, 4).

        >>> pair = torch.nn.ParameterDict({"a": torch.tensor([2.0]), "b": torch.tensor([1.0])})
        >>> def loss():
        ...     return (pair["a"] ** 2 * pair["b"] / 2).sum()
        >>> GraSP().look(Probe(pair, loss, pair, None, dict(pair), {"a": 1, "b": 1}))
        {'a': tensor([12.]), 'b': tensor([4.])}
    """

    def look(self, probe: Probe) -> dict[str, Tensor]:
        """W (H g), by a product of the Hessian and a vector."""
        weights, cudnn = list(probe.parameters.values()), torch.backends.cudnn
        enabled, recurrent = cudnn.enabled, any(isinstance(m, nn.RNNBase) for m in probe.model.modules())
        try:  # fused attention and cuDNN's recurrent layers have no second derivative
            cudnn.enabled = enabled and not recurrent
            with sdpa_kernel(SDPBackend.MATH):
                products = _hessian_times_gradient(probe.loss(), weights)
        finally:
            cudnn.enabled = enabled
        pairs = zip(probe.parameters.items(), products, strict=True)
        return {name: weight.detach() * product for (name, weight), product in pairs}


def _hessian_times_gradient(loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """H g of each weight, zero for one that the loss does not depend on."""
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    flow = torch.stack([(g * g.detach()).sum() for g in first]).sum()
    return torch.autograd.grad(flow, weights, materialize_grads=True)
