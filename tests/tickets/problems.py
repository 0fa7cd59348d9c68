"""A network with statistics, momentum and a learning rate that falls, trained in a fraction of a second."""

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_rigl import load_masks
from lightning_rigl.tickets import LotteryTickets
from tests.callbacks.problems import data

STEPS = 12  # three epochs of four


class Net(pl.LightningModule):
    """Sixteen inputs, four classes: 384 + 96 weights."""

    def __init__(self, hidden=24, interval="step"):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 4)
        )
        self.interval = interval

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)
        gamma = 0.9 if self.interval == "step" else 0.5
        falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": self.interval}}


class Seeds:
    """Makes a network with other weights each time, as every fresh start of a program would."""

    def __init__(self, **settings):
        self.made, self.settings = 0, settings

    def __call__(self):
        self.made += 1
        torch.manual_seed(100 + self.made)
        return Net(**self.settings)


class Watch(pl.Callback):
    """Writes down the state before the first step and the learning rate of each."""

    def __init__(self):
        self.rates, self.start = [], None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        if self.start is None:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            moments = {
                name: optimizer.state[p]["momentum_buffer"].clone()
                for name, p in module.named_parameters()
                if p in optimizer.state
            }
            self.start = {"step": trainer.global_step, "weights": weights, "momentum": moments}
        self.rates.append(optimizer.param_groups[0]["lr"])


class Trainers:
    """Makes a trainer for each round, with a watch of its own."""

    def __init__(self, *callbacks, **settings):
        self.callbacks, self.settings, self.watches = callbacks, settings, []

    def __call__(self, callbacks):
        self.watches.append(Watch())
        return pl.Trainer(
            **{
                "max_epochs": 3,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accelerator": "cpu",
                **self.settings,
            },
            callbacks=[*callbacks, *self.callbacks, self.watches[-1]],
        )


def tickets(folder="tickets", model=None, trainer=None, rounds=2, prune=0.25, **settings):
    return LotteryTickets(folder, model or Seeds(), trainer or Trainers(), rounds, prune, **settings)


def loader():
    """Four batches an epoch, always the same."""
    return data(samples=32)


def end(ticket):
    """Weights, optimizer state, masks and metrics at the end of a round."""
    saved = torch.load(ticket.checkpoint, weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    masks = load_masks(ticket.checkpoint)
    return {**{key: saved[key] for key in kept}, "masks": masks, "metrics": ticket.metrics}
