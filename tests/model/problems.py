"""The optimizers that the contract holds for, and a small network to train."""

import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)


class Lion(Optimizer):
    """Sign of an interpolated momentum; its constructor wants the learning rate."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((m * group["betas"][0] + p.grad * (1 - group["betas"][0])).sign(), alpha=-group["lr"])
                m.mul_(group["betas"][1]).add_(p.grad, alpha=1 - group["betas"][1])


class Noisy(SGD):
    """Gradient noise on every weight: what mixes coordinates without our knowing its name."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(torch.randn_like(p), alpha=1e-3)
        return loss


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd-nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-maximize-foreach": lambda p: SGD(
        p, 1e-4, momentum=0.9, maximize=True, foreach=True, weight_decay=0.1
    ),
    "sgd-fused": lambda p: SGD(p, 0.1, momentum=0.9, fused=True),
    "adam-amsgrad": lambda p: Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop-centered": lambda p: RMSprop(p, 0.01, centered=True, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: Adagrad(p, 0.01, initial_accumulator_value=0.1, weight_decay=0.1),
    "adadelta": lambda p: Adadelta(p, weight_decay=0.1),
    "adamax": lambda p: Adamax(p, 0.01, weight_decay=0.1),
    "rprop": lambda p: Rprop(p, 0.01),
    "asgd": lambda p: ASGD(p, 0.01, weight_decay=0.1),
    "nadam": lambda p: NAdam(p, 0.01, weight_decay=0.1),
    "radam": lambda p: RAdam(p, 0.01, weight_decay=0.1),
    "lion": lambda p: Lion(p, 0.001, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, 0.01, weight_decay=0.1),
    "muon": lambda p: Muon([q for q in p if q.dim() == 2], 0.01, weight_decay=0.1),
    "noisy": lambda p: Noisy(p, 0.1, momentum=0.9),
}
MIXING = {"muon", "noisy"}


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    layers = nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)
    return nn.Sequential(*layers).to(device, dtype)


def batches(count, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(8, 12, generator=generator, dtype=torch.float64).to(device, dtype),
            torch.randn(8, 4, generator=generator, dtype=torch.float64).to(device, dtype),
        )
        for _ in range(count)
    ]
