"""A module small enough that a fit takes a fraction of a second."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Small(pl.LightningModule):
    """Sixteen inputs, four classes; every setting that a test varies is an argument."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), dtype=torch.float32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype)
        self.make = optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.make(self.parameters())


def small(seed=0, **arguments):
    torch.manual_seed(seed)
    return Small(**arguments)


def data(samples=64, batch_size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 16, generator=generator, dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=batch_size)


def trainer(*callbacks, **arguments):
    settings = {
        "max_epochs": 5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        **arguments,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)
