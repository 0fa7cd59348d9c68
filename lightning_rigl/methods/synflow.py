"""SynFlow: prune before training without data, in many rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_rigl.methods.base import Probe, ScoredOnce
from lightning_rigl.topology import selection

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class SynFlow(ScoredOnce):
    """Iterative synaptic flow pruning.

    Before the first step, and without data: with the absolute values of all parameters, biases of zero, norm
    layers that pass on what they get, evaluation mode and an input of ones, R is the sum of the outputs and
    |w| dR/d|w| the score of a connection. Round k of n keeps the highest of all layers, N d^(k/n) of N
    connections, d being the final density; what the last one keeps stays, in place of step 0. All is in
    float64, as scores are beyond float32 in deep networks. The distribution decides how many connections
    there are, not where. A layer that all paths lead through is never emptied, as its scores add up to R.

    Meant for linear layers, convolutions and activations like ReLU; ``forward`` takes one floating tensor and
    gives one, before any softmax. In a plain loop call `Sparsifier.look`.

    Args:
        rounds: how often the scores are taken anew, at least 1, or ValueError (n in the paper).

    Reference:
        Tanaka et al., *Pruning neural networks without any data by iteratively conserving synaptic flow*,
        NeurIPS 2020, arXiv:2006.05467, algorithm 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for layer, values in zip(net, ([[3.0, -1.0], [1.0, 1.0]], [[1.0, -0.5]])):
        ...     layer.weight.data = torch.tensor(values)
        >>> probe = Probe(net, net, net, torch.randn(8, 2), dict(net.named_parameters()),
        ...               {"0.weight": 2, "1.weight": 1})
        >>> {name: score.tolist() for name, score in SynFlow(rounds=3).look(probe).items()}
        {'0.weight': [[3.0, 3.0], [2.0, 0.0]], '1.weight': [[3.0, 1.0]]}
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds: a whole number of at least 1, got {self.rounds!r}")

    def look(self, probe: Probe) -> dict[str, Tensor]:
        """How many rounds each connection lasts: ``rounds`` for those that stay."""
        if probe.example is None:
            raise ValueError(
                "SynFlow feeds the model an input of ones, and the first batch has no floating tensor to "
                "take its shape from; for a model of indices, such as tokens, take snip or grasp"
            )
        _make_linear(probe.model)
        ones = torch.ones_like(probe.example[:1], dtype=torch.float64)
        weights = list(probe.parameters.values())
        size, target = sum(w.numel() for w in weights), sum(probe.targets.values())
        active = torch.ones(size, dtype=torch.bool, device=weights[0].device)
        lasted = torch.zeros(size, device=active.device)
        for k in range(1, self.rounds + 1):
            flow = _flow(probe, ones, weights, first=k == 1)
            kept = target if k == self.rounds else round(size * (target / size) ** (k / self.rounds))
            active = selection.top(flow, kept, active)
            lasted += active
            _mask(weights, active)
        return dict(zip(probe.parameters, _split(lasted, weights), strict=True))


def _make_linear(model: nn.Module) -> None:
    """Positive weights in float64, no biases, no dropout, no norms."""
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.abs_().mul_("bias" not in name.rsplit(".", 1)[-1])
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.register_forward_hook(lambda _module, inputs, _output: inputs[0])


def _mask(weights: Sequence[nn.Parameter], active: Tensor) -> None:
    with torch.no_grad():
        for weight, part in zip(weights, _split(active, weights), strict=True):
            weight.mul_(part)


def _split(flat: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(flat, [w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def _flow(probe: Probe, ones: Tensor, weights: Sequence[nn.Parameter], first: bool) -> Tensor:
    """|w| dR/d|w| of all layers, one after the other; ValueError where the model does not give it."""
    try:
        output = probe.forward(ones)
    except Exception as error:
        raise ValueError(
            f"SynFlow feeds forward one float64 tensor of ones of shape {tuple(ones.shape)}, like one sample "
            f"of the first batch, and forward fails: {type(error).__name__}: {error}; give the model a "
            "forward of one tensor, or take snip or grasp, which score by the training step"
        ) from error
    if not isinstance(output, Tensor):
        raise ValueError(f"SynFlow sums up the output, a tensor; forward gives {type(output).__name__}")
    total = output.sum()
    grads = torch.autograd.grad(total, weights, materialize_grads=True)
    flow = torch.cat([(w.detach() * g).reshape(-1) for w, g in zip(weights, grads, strict=True)])
    if first and not flow.sum() > 1e-4 * total.abs():  # nor if they are infinite, or no number
        raise ValueError(
            f"SynFlow: with positive weights and an input of ones the outputs add up to {float(total):.3g} "
            f"and the scores to {float(flow.sum()):.3g}; activations must pass on what they get, as ReLU "
            "does, and no softmax may follow: give such a model to snip or grasp"
        )
    return flow
