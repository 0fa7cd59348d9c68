"""RigL without Lightning: a `Sparsifier` in a plain PyTorch loop, on scikit-learn's 8 x 8 digits.

Run it with ``python examples/plain_pytorch.py``; it takes a few seconds on one core.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_rigl import Sparsifier, UpdateSchedule


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] and labels; every fifth is held out."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def train(
    method: str = "rigl", sparsity: float = 0.98, epochs: int = 20, seed: int = 0
) -> tuple[float, Sparsifier]:
    """The accuracy on the held-out images, and the sparsifier with its masks."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = digits()
    batches = (len(images) + 31) // 32
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    sparsifier = Sparsifier(model, sparsity, method, schedule=UpdateSchedule(every=20))
    sparsifier.start(total_steps=epochs * batches)  # the schedule ends at 75 % of these

    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            sparsifier.before_step(optimizer, step)  # masks the gradients; at an update, replaces the step
            optimizer.step()
            sparsifier.after_step()
            step += 1

    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return accuracy, sparsifier


def main() -> None:
    """Train by the three methods at 98 % sparsity, with one seed."""
    for method in ("static", "set", "rigl"):
        accuracy, sparsifier = train(method)
        print(
            f"{method:6}  accuracy {accuracy:.3f}   density {sparsifier.density:.4f}   "
            f"{sparsifier.updates} topology updates"
        )
    print(sparsifier.summary())


if __name__ == "__main__":
    main()
