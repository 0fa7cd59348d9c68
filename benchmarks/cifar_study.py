"""WideResNets on CIFAR-10: a short protocol for two cores, and the RigL paper's for a GPU."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule, plan_flops
from studies import DENSE, Case, Study, new_trainer, outcome

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from data import Batches
from digits import quiet
from networks import Classifier
from paper_networks import WideBlock

BATCH_SIZE, LR, WEIGHT_DECAY, PADDING, SIDE = 128, 0.1, 5e-4, 4, 32
DECAYS = tuple(30_000 * i / 97_656 for i in (1, 2, 3))  # shares of the paper's 97,656 steps
BEGIN, END = 20_000 / 97_656, 75_000 / 97_656
UPDATES = UpdateSchedule(every=100, drop_fraction=0.3, end=END)
METHODS = ("static", "set", "rigl", "gradual")


@dataclass(frozen=True)
class Protocol:
    """What distinguishes the two protocols.

    Args:
        depth: of the WideResNet, 6n + 4.
        width: its factor.
        epochs: of each run.
        sparsities: of the sparse runs.
        prune_every: steps between two prunings of gradual.
        accelerator: where it trains.
        published: (method, sparsity) -> top-1 accuracy in the papers.
        source: of these values.
    """

    depth: int
    width: int
    epochs: int
    sparsities: tuple[float, ...]
    prune_every: int
    accelerator: str
    published: dict[tuple[str, float], float]
    source: str = ""


VALUES = {"rigl": (93.6, 92.9, 91.8), "static": (92.9, 91.5, 89.0), "gradual": (93.6, 93.3, 92.3)}
RIGL = {(m, s): value for m, row in VALUES.items() for s, value in zip((0.8, 0.9, 0.95), row, strict=True)}
PAPER = {("dense", DENSE): 94.1, **RIGL, ("set", 0.8): 92.9, ("set", 0.9): 92.2}
SOURCE = (
    "RigL paper, section 4.3 (its authors' numbers), ERK, WRN-22-2, 250 epochs, nothing held out; set: the "
    "reproducibility report, arXiv:2103.15767, which holds out 5,000 images. Different here: the images were "
    "compressed as JPEG, so accuracies are lower; the last, incomplete batch of an epoch is left out (97,500 "
    "steps, not 97,656); the first update is at step 100, not 0; images are standardised by channel."
)
PROTOCOLS = {
    "short": Protocol(10, 1, 5, (0.9, 0.95), 10, "cpu", {}),
    "paper": Protocol(22, 2, 250, (0.8, 0.9, 0.95), 1000, "auto", PAPER, SOURCE),
}


class WideResNet(nn.Module):
    """A WideResNet of depth 6n + 4; ten classes.

    Raises:
        ValueError: a depth of another form.

    Reference:
        Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016, arXiv:1605.07146.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if n < 1 or rest:
            raise ValueError(f"depth: 6n + 4, as 10, 16 or 22, got {depth}")
        channels = [16, *[16 * width] * n, *[32 * width] * n, *[64 * width] * n]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        pairs = enumerate(pairwise(channels))
        self.blocks = nn.Sequential(*(WideBlock(a, b, 2 if i in (n, 2 * n) else 1) for i, (a, b) in pairs))
        self.bn, self.fc = nn.BatchNorm2d(channels[-1]), nn.Linear(channels[-1], 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, 10)."""
        return self.fc(relu(self.bn(self.blocks(self.conv1(images)))).mean((2, 3)))


@dataclass(frozen=True)
class Pictures:
    """Images of shape (n, 3, 32, 32) in bytes, with their labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Viewer(Classifier):
    """Standardises bytes on the device, crops and mirrors at random; the rate is divided by 5 three times."""

    def __init__(self, net: nn.Module, pictures: Pictures, seed: int) -> None:
        super().__init__(net, LR, WEIGHT_DECAY)
        channels = pictures.train_images.transpose(0, 1).flatten(1)
        moments = [torch.std_mean(channel.float()) for channel in channels]
        self.register_buffer("deviation", torch.stack([m[0] for m in moments]).view(3, 1, 1))
        self.register_buffer("mean", torch.stack([m[1] for m in moments]).view(3, 1, 1))
        self.generator = torch.Generator().manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch that is cropped and mirrored at random."""
        images, labels = batch
        return cross_entropy(self.net(augmented(self._standardised(images), self.generator)), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers."""
        super().test_step((self._standardised(batch[0]), batch[1]), batch_idx)

    def _standardised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.deviation

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with Nesterov momentum 0.9; weight decay on what has two or more dimensions."""
        wide = [p for p in self.parameters() if p.ndim > 1]
        narrow = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": wide, "weight_decay": WEIGHT_DECAY}, {"params": narrow, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True)
        steps = [round(share * self.trainer.estimated_stepping_batches) for share in DECAYS]
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels, zeros at its border, and mirrored with probability 1/2.

    Args:
        images: standardised, of shape (N, C, H, W).
        generator: on the CPU.
    """
    count, _, height, width = images.shape
    draws = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
    top, left = draws.to(images.device)
    mirror = torch.randint(2, (count, 1), generator=generator).bool().to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirror, columns.flip(1), columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    bordered = pad(images, [PADDING] * 4).permute(0, 2, 3, 1)
    return bordered[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@cache
def pictures(directory: Path) -> Pictures:
    """The images, decoded once in each process.

    Raises:
        FileNotFoundError: cifar10_jpeg.npz is not in the directory.
        ValueError: it lacks an array.
    """
    with np.load(file_in(directory)) as archive:
        halves = [(decoded(archive, part), archive[f"{part}_labels"]) for part in ("train", "test")]
    (train, train_labels), (test, test_labels) = halves
    return Pictures(train, torch.from_numpy(train_labels).long(), test, torch.from_numpy(test_labels).long())


def file_in(directory: Path) -> Path:
    """The file of the images; see `pictures`."""
    path = directory / "cifar10_jpeg.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; --data-dir names the folder that holds it. Its arrays: "
            "train_jpeg, all JPEG files one behind the other, train_offsets, where each begins and the last "
            "ends, train_labels, and the same of test"
        )
    names = {f"{part}_{kind}" for part in ("train", "test") for kind in ("jpeg", "offsets", "labels")}
    with np.load(path) as archive:
        if missing := sorted(names - set(archive)):
            raise ValueError(
                f"{path}: lacks {', '.join(missing)}; it holds {', '.join(archive) or 'nothing'}"
            )
    return path


def decoded(archive: Any, part: str) -> Tensor:
    """The images of a part, in bytes, of shape (n, 3, 32, 32)."""
    files, offsets = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"].tolist()
    images = np.empty((len(offsets) - 1, SIDE, SIDE, 3), np.uint8)
    for place, (begin, end) in enumerate(pairwise(offsets)):
        images[place] = np.asarray(Image.open(io.BytesIO(files[begin:end])).convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def schedule_of(method: str, protocol: Protocol) -> UpdateSchedule:
    """The paper's, in shares of training."""
    pruning = UpdateSchedule(every=protocol.prune_every, begin=BEGIN, end=END, policy="after_step")
    return pruning if method == "gradual" else UPDATES


def train(case: Case, directory: Path, protocol: Protocol) -> dict[str, float]:
    """One run: test accuracy in per cent after the last epoch, and what it cost."""
    (method, sparsity, seed), data = case, pictures(directory)
    seed_everything(seed, verbose=False)
    module = Viewer(WideResNet(protocol.depth, protocol.width), data, seed)
    flops, start = FLOPsCallback(), time.perf_counter()
    callbacks: list[Callback] = [flops]
    if method != "dense":
        callbacks.append(RigLCallback(sparsity, method, schedule=schedule_of(method, protocol), seed=seed))
    batches = Batches(data.train_images, data.train_labels, BATCH_SIZE, seed=seed)
    with quiet():
        trainer = new_trainer(callbacks, protocol.epochs, accelerator=protocol.accelerator)
        trainer.fit(module, batches)
        test = Batches(data.test_images, data.test_labels, 1000)
        accuracy = 100 * trainer.test(module, test, verbose=False)[0]["accuracy"]
    net = WideResNet(protocol.depth, protocol.width)
    dense = 3 * plan_flops(net, (1, 3, SIDE, SIDE)).cost.forward_dense
    samples = protocol.epochs * len(batches) * BATCH_SIZE
    return outcome(round(accuracy, 2), module, flops, dense * samples, start)


def study(seeds: int, name: str = "short") -> Study:
    """Dense, Static, SET, RigL and gradual pruning, ERK."""
    protocol = PROTOCOLS[name]
    network = f"WRN-{protocol.depth}-{protocol.width}"
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [(m, s, seed) for seed in range(seeds) for s in protocol.sparsities for m in METHODS]
    return Study(
        f"methods_cifar_{name}",
        f"CIFAR-10, {network}, {protocol.epochs} epochs",
        tuple(cases),
        partial(train, protocol=protocol),
        settings(protocol, network),
        "Test accuracy in per cent",
        protocol.published,
        protocol.source,
        look=file_in,
    )


def settings(protocol: Protocol, network: str) -> dict[str, Any]:
    """What two sets of runs must share to be compared."""
    shares: Sequence[str] = [f"{share:.3f}" for share in DECAYS]
    return {
        "model": f"{network}, He initialisation of convolutions; norms and biases dense",
        "data": "50,000 JPEG images, standardised by channel, moved by up to 4 pixels, mirrored",
        "epochs": protocol.epochs,
        "batch_size": BATCH_SIZE,
        "optimizer": f"SGD, lr {LR}, Nesterov momentum 0.9, weight decay {WEIGHT_DECAY}; the same for all",
        "lr_decay": f"x 0.2 after {', '.join(shares)} of the steps",
        "distribution": "ERK",
        "schedule": f"{UPDATES}; gradual: {schedule_of('gradual', protocol)}",
    }
