"""The networks of the examples, and a LightningModule that knows nothing of sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_rigl import Sparsifier


def mlp(pixels: int, widths: Sequence[int] = (300, 100)) -> nn.Sequential:
    """LeNet-300-100, or the same with other widths."""
    first, second = widths
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 10),
    )


def cnn(pixels: int, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:
    """Three 3 x 3 convolutions, the second and third with stride 2, then the mean over the image."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip((1, *widths), widths, strict=False)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


MODELS: dict[str, tuple[Callable[..., nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (300, 100)),
    "cnn": (cnn, (16, 32, 64)),
}


class Classifier(LightningModule):
    """Cross entropy by SGD with momentum; nothing in it knows of sparsity."""

    def __init__(self, net: nn.Module, lr: float = 0.1, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay = net, lr, weight_decay
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; nothing is logged, a log call on each step would cost a fifth of it."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers."""
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD, its learning rate falling to 0 along half a cosine."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
        )
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": decay}


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Weights of linear layers and convolutions, and the biases and norms that always stay dense."""
    sizes = [(parameter.ndim >= 2, parameter.numel()) for parameter in module.parameters()]
    return sum(size for wide, size in sizes if wide), sum(size for wide, size in sizes if not wide)


def thin_widths(model: str, pixels: int, sparsity: float) -> tuple[int, ...]:
    """Widths, all scaled alike, of the dense net that is nearest in size to the sparse one."""
    build, full = MODELS[model]
    net = build(pixels, full)
    budget = sum(Sparsifier(net, sparsity, seed=0).counts.values()) + count_parameters(net)[1]
    scaled = {tuple(max(1, round(width * i / 1000)) for width in full) for i in range(1, 1001)}
    with torch.device("meta"):  # they are only counted
        sizes = {widths: sum(count_parameters(build(pixels, widths))) for widths in scaled}
    return min(sizes, key=lambda widths: (abs(sizes[widths] - budget), widths))
