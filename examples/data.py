"""Handwritten digits as tensors in memory: scikit-learn's embedded ones, or MNIST from files on disk."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, height, width), black = 0 and white = 1, with their labels, split in two."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def standardised(self, centred: bool = True) -> Digits:
        """The same with pixels of deviation 1 and, if ``centred``, mean 0 over the training images.

        Without centring, black stays 0: a pixel that is always black then gives its weights no gradient.
        """
        deviation, mean = torch.std_mean(self.train_images)
        shift = mean if centred else torch.zeros(())
        train, test = ((images - shift) / deviation for images in (self.train_images, self.test_images))
        return replace(self, train_images=train, test_images=test)


class Batches:
    """Batches cut out of tensors in memory: what a DataLoader does, without collating sample by sample.

    Args:
        images: all of them.
        labels: one for each image.
        batch_size: images in a batch; when shuffling, an incomplete last batch is left out.
        seed: of the order, which is drawn anew each epoch; None keeps the order and every image.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int | None = None) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        batches = len(self.labels) / self.batch_size
        return math.ceil(batches) if self.generator is None else max(1, math.floor(batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        total = len(self.labels)
        order = (
            torch.arange(total) if self.generator is None else torch.randperm(total, generator=self.generator)
        )
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


def load(name: str, directory: Path | None = None) -> Digits:
    """The digits called ``name``: ``digits`` (scikit-learn, embedded) or ``mnist`` (from ``directory``).

    Raises:
        FileNotFoundError: MNIST is not in the directory; the message says which files are looked for.
        ValueError: MNIST without a directory, or a file that holds something else.
    """
    if name == "digits":
        return scikit_learn_digits()
    if directory is None:
        raise ValueError("MNIST is read from disk: name the folder that holds it with --data-dir")
    return mnist(directory)


def scikit_learn_digits() -> Digits:
    """1,797 digits of 8 x 8 pixels in 17 grey levels; a fixed third of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    train, test = train_test_split(
        np.arange(len(images)), test_size=1 / 3, stratify=digits.target, random_state=0
    )
    labels = torch.tensor(digits.target, dtype=torch.long)
    return Digits("digits", images[train], labels[train], images[test], labels[test])


def mnist(directory: Path) -> Digits:
    """MNIST as Keras stores it (``mnist.npz``) or as torchvision does (``MNIST/raw/*-ubyte`` or ``.gz``)."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: there is no such folder; --data-dir names the one with MNIST in it"
        )
    if (directory / "mnist.npz").is_file():
        arrays = _read_npz(directory / "mnist.npz")
    else:
        raw = directory / "MNIST" / "raw"
        names = (
            f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        )
        arrays = [read_idx(_find(directory, raw / name)) for name in names]
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    return Digits(
        "mnist",
        train_images.unsqueeze(1).float() / 255,
        train_labels.long(),
        test_images.unsqueeze(1).float() / 255,
        test_labels.long(),
    )


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format of the MNIST files: 0, 0, type, rank, the sizes, the values.

    Raises:
        ValueError: not an IDX file of unsigned bytes, or one that was cut off.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, it starts with {content[:4]!r}")
    rank = content[3]
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != math.prod(shape):
        raise ValueError(f"{path}: holds {values.size} values where its header announces {shape}")
    return values.reshape(shape).copy()  # the buffer is read-only


def _read_npz(path: Path) -> list[np.ndarray]:
    names = ("x_train", "y_train", "x_test", "y_test")
    with np.load(path) as archive:
        missing = [name for name in names if name not in archive]
        if missing:
            raise ValueError(
                f"{path}: lacks {', '.join(missing)}; it holds {', '.join(archive) or 'nothing'}"
            )
        return [archive[name] for name in names]


def _find(directory: Path, path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{directory}: MNIST is not complete here; looked for mnist.npz (Keras' layout) and for "
        f"{path.relative_to(directory)}, also .gz (torchvision's). "
        f"torchvision.datasets.MNIST({str(directory)!r}, download=True) fetches the latter"
    )
