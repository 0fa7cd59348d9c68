"""LightningModules of every kind that is measured: on a copy without values, or on the real step."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tests.callbacks.flops_problems import Manual
from tests.callbacks.problems import Small


class Noisy(Small):
    """Everything that a measurement could disturb; the products are those of Small."""

    calls = 0

    def __init__(self):
        super().__init__()
        layers = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.Tanh(), nn.Linear(24, 4)
        self.net = nn.Sequential(*layers)
        self.net[2].eval()

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return super().training_step(batch, batch_idx)


class OnlyBatch(Noisy):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class OwnDevice(Noisy):
    def training_step(self, batch, batch_idx):
        x = batch[0] + torch.zeros(16, device=self.device)
        return super().training_step((x, batch[1]), batch_idx)


class PlainTensor(Noisy):
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(4)  # neither parameter nor buffer

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1], self.weights)


class Item(Noisy):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0
        return loss


class AsksTheTrainer(Noisy):
    def training_step(self, batch, batch_idx):
        assert self.trainer.global_step >= 0
        return super().training_step(batch, batch_idx)


class Draws(Noisy):
    """Uses every global generator."""

    def training_step(self, batch, batch_idx):
        x = batch[0] * random.random() + np.random.rand() + torch.rand(1)
        return super().training_step((x, batch[1]), batch_idx)


class OwnLoop(Noisy):
    def training_step(self, dataloader_iter):
        batch = next(dataloader_iter)[0]
        return cross_entropy(self(batch[0]), batch[1])


class Hooked(Noisy):
    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, out: seen.append(out.device.type))


class Recomputes(Noisy):
    """Activation checkpointing: the backward pass repeats a dropout and a batch norm."""

    def forward(self, x):
        return self.net[4](checkpoint(self.net[:4], x, use_reentrant=False))


class ByHand(Noisy, Manual):
    pass


seen = []  # what a hook of a module writes to
ON_A_COPY = [Noisy, OnlyBatch, OwnDevice, PlainTensor]
IN_VAIN_ON_A_COPY = [Item, AsksTheTrainer, Draws]
ON_A_REAL_STEP = [ByHand, OwnLoop, Hooked]
EVERY_KIND = [*ON_A_COPY, *IN_VAIN_ON_A_COPY, *ON_A_REAL_STEP]
