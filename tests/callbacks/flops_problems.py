"""What the tests of FLOPsCallback share: batches of given sizes, and f_S told by the masks themselves."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader

from lightning_rigl import RigLCallback, UpdateSchedule
from lightning_rigl.flops.tracer import Tracer
from tests.callbacks.problems import Small, trainer

F_D = 2 * (16 * 24 + 24 * 4)  # of Small, per sample


class Silent(Small):
    """Logs nothing, so that no value is averaged over devices."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Manual(Silent):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Attends(Silent):
    """A query meets keys and values of another sequence: two slices of ``in_proj_weight``."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        memory = torch.stack([x, x + 1, x - 1], 1)
        return self.attention(x[:, None], memory, memory)[0][:, 0, :4] + self.net(x)


class GAN(pl.LightningModule):
    """Two networks, two optimizers: a batch has one step of the generator and two of the critic."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(16, 12, bias=False), nn.Linear(12, 4, bias=False)

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), 0.1) for network in (self.generator, self.critic)]

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        for optimizer in (generator, critic, critic):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            score = self.critic(self.generator(batch[0]))
            self.manual_backward(bce(score, torch.ones_like(score)))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def batches(*sizes):
    """One batch of each size, in this order in every epoch."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(size, 16, generator=generator) for size in sizes]
    return DataLoader([(each, each[:, :4].argmax(1)) for each in x], batch_size=None)


def rigl(every=2, end=100, **settings):
    return RigLCallback(0.75, schedule=UpdateSchedule(every=every, end=end), seed=1, **settings)


def fit(*callbacks, module=None, sizes=(8, 8, 4), loader=None, ckpt=None, **arguments):
    """One epoch, unless told otherwise; returns the trainer."""
    run = trainer(*callbacks, **{"max_epochs": 1, **arguments})
    module = Small() if module is None else module
    loader = batches(*sizes) if loader is None else loader
    run.fit(module, loader, ckpt_path=ckpt)
    return run


class Counts(pl.Callback):
    """Samples, f_S and what the dense gradient costs more, of every batch, by the masks before it."""

    def __init__(self, rigl):
        self.rigl, self.batches, self.updates = rigl, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.f_s = sum(2 * int(mask.sum()) for mask in self.rigl.masks.values())
        self.batches.append((len(batch[0]), self.f_s))
        self.done = self.rigl.sparsifier.updates

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.rigl.sparsifier.updates > self.done:
            self.updates.append(len(self.batches) - 1)

    @property
    def ordinary(self):
        return sum(3 * samples * f_s for samples, f_s in self.batches)


def measurements(monkeypatch):
    """One entry per measurement: whether it looks at a copy without values."""
    made, original = [], Tracer.__init__

    def init(tracer, parameters, *arguments, **settings):
        made.append(all(parameter.is_meta for parameter in parameters.values()))
        original(tracer, parameters, *arguments, **settings)

    monkeypatch.setattr(Tracer, "__init__", init)
    return made
