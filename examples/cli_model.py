"""The model and the data that ``examples/configs`` name: scikit-learn's 8 x 8 digits."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class DigitsMLP(LightningModule):
    """A multilayer perceptron; nothing in it knows of sparsity.

    Args:
        hidden: width of each hidden layer.
        lr: learning rate of AdamW.
    """

    def __init__(self, hidden: tuple[int, ...] = (300, 100), lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # for Lightning's own summary
        widths = (64, *hidden)
        hidden_layers = [
            layer
            for before, after in zip(widths, hidden, strict=False)
            for layer in (nn.Linear(before, after), nn.ReLU())
        ]
        self.net = nn.Sequential(*hidden_layers, nn.Linear(widths[-1], 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        return self.net(images.flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class DigitsData(LightningDataModule):
    """1,797 handwritten digits; every fifth is for validation.

    Args:
        batch_size: images per step.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read the images, scaled to [0, 1]."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train = TensorDataset(images[~held_out], labels[~held_out])
        self.val = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.val, 256)
