"""A character-level GRU on tinyshakespeare: the language model of the RigL paper, scaled down."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_rigl import FLOPsCallback, RigLCallback, Sparsifier, Uniform, UpdateSchedule, plan_flops
from studies import DENSE, Case, Study, new_trainer, outcome

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from digits import quiet

EMBEDDING, HIDDEN, READOUT = 64, 256, 128
BATCH_SIZE, LENGTH, STEPS = 32, 100, 2000
LR, WEIGHT_DECAY, CLIP = 7e-4, 5e-4, 10.0
UPDATES = UpdateSchedule(every=100, drop_fraction=0.1, end=1.0)
PRUNING = UpdateSchedule(every=10, begin=0.25, end=0.75, policy="after_step")
EVERYWHERE = Uniform(dense_first=False)
METHODS = ("small-dense", "static", "set", "rigl", "snfs", "gradual")


class CharGRU(nn.Module):
    """A GRU over characters and two layers of readout; the embedding is the output layer, too.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134, app. I.
    """

    def __init__(self, characters: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        readout = max(1, READOUT * hidden // HIDDEN)
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.gru = nn.GRU(EMBEDDING, hidden, batch_first=True)
        self.first, self.second = nn.Linear(hidden, readout), nn.Linear(readout, EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING**-0.5)  # it is the output layer, too

    def forward(self, text: Tensor) -> Tensor:
        """(N, T) -> logits of the following characters, (N, T, number of characters)."""
        states, _ = self.gru(self.embedding(text))
        return self.second(self.first(states).relu()) @ self.embedding.weight.t()


class Reader(LightningModule):
    """Cross entropy by Adam at a constant rate; nothing in it knows of sparsity."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def _loss(self, text: Tensor) -> Tensor:
        return cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch, in nats per character."""
        return self._loss(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """The mean over all characters, in bits."""
        self.log("bits", self._loss(batch) / math.log(2), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with the L2 penalty in its gradient as in the paper."""
        return torch.optim.Adam(self.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)


@dataclass(frozen=True)
class Text:
    """Characters as numbers, the last tenth kept for validation."""

    training: Tensor
    validation: Tensor
    characters: int


class Windows:
    """Batches of windows of a text, at random places.

    Args:
        text: characters as numbers, of shape (n,).
        steps: number of batches.
        seed: of the places.
    """

    def __init__(self, text: Tensor, steps: int, seed: int) -> None:
        self.text, self.steps = text, steps
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        windows = self.text.unfold(0, LENGTH + 1, 1)  # each predicts LENGTH characters
        for _ in range(self.steps):
            yield windows[torch.randint(len(windows), (BATCH_SIZE,), generator=self.generator)]


@cache
def text(directory: Path) -> Text:
    """The text, read once in each process.

    Raises:
        FileNotFoundError: tinyshakespeare.txt is not in the directory.
        ValueError: the validation text is shorter than a window.
    """
    path = directory / "tinyshakespeare.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; --data-dir names the folder that holds it")
    content = path.read_text(encoding="utf-8")
    alphabet = {character: i for i, character in enumerate(sorted(set(content)))}
    numbers = torch.tensor([alphabet[character] for character in content])
    held_out = len(numbers) // 10
    if held_out <= LENGTH:
        raise ValueError(f"{path}: a tenth of {len(numbers):,} characters is no window of {LENGTH + 1}")
    return Text(numbers[:-held_out], numbers[-held_out:], len(alphabet))


def thin_hidden(characters: int, sparsity: float) -> int:
    """The state's size of the dense net that is nearest in size to the sparse one; the readout follows."""
    net = CharGRU(characters)
    sparse = Sparsifier(net, sparsity, distribution=EVERYWHERE, seed=0).counts
    dense = sum(p.numel() for name, p in net.named_parameters() if name not in sparse)
    budget = sum(sparse.values()) + dense
    with torch.device("meta"):  # they are only counted
        sizes = {h: sum(p.numel() for p in CharGRU(characters, h).parameters()) for h in range(1, HIDDEN + 1)}
    return min(sizes, key=lambda hidden: (abs(sizes[hidden] - budget), hidden))


def train(case: Case, directory: Path, steps: int = STEPS) -> dict[str, float]:
    """One run: bits per character of the validation text after the last step, and what it cost."""
    (method, sparsity, seed), data = case, text(directory)
    seed_everything(seed, verbose=False)
    hidden = thin_hidden(data.characters, sparsity) if method == "small-dense" else HIDDEN
    module, flops, start = Reader(CharGRU(data.characters, hidden)), FLOPsCallback(), time.perf_counter()
    callbacks: list[Callback] = [flops]
    if "dense" not in method:
        schedule = PRUNING if method == "gradual" else UPDATES
        callbacks.append(RigLCallback(sparsity, method, EVERYWHERE, schedule, seed=seed))
    validation = data.validation.unfold(0, LENGTH + 1, LENGTH)
    with quiet():
        trainer = new_trainer(callbacks, epochs=1, clip=CLIP)
        trainer.fit(module, Windows(data.training, steps, seed))
        bits = trainer.test(module, DataLoader(validation, batch_size=100), verbose=False)[0]["bits"]
    example = torch.zeros(BATCH_SIZE, LENGTH, dtype=torch.long)
    cost = plan_flops(CharGRU(data.characters), example, sparsity=0.0, distribution=EVERYWHERE).cost
    return outcome(round(bits, 4), module, flops, 3 * cost.forward_dense * BATCH_SIZE * steps, start)


def study(seeds: int, steps: int = STEPS) -> Study:
    """Seven systems at 75 and 90 %."""
    cases: list[Case] = [("dense", DENSE, seed) for seed in range(seeds)]
    cases += [(method, s, seed) for seed in range(seeds) for method in METHODS for s in (0.75, 0.9)]
    return Study(
        "methods_text",
        "Characters of tinyshakespeare, GRU, 2,000 steps",
        tuple(cases),
        train,
        {
            "model": f"embedding {EMBEDDING} (also the output layer), GRU {HIDDEN}, linear layers of "
            f"{READOUT} (ReLU) and {EMBEDDING}; embedding and biases dense",
            "data": "tinyshakespeare; the last tenth is the validation text, in windows of "
            f"{LENGTH} characters that each start from the zero state",
            "steps": steps,
            "batch": f"{BATCH_SIZE} windows of {LENGTH} characters at random places",
            "optimizer": f"Adam, lr {LR}, L2 {WEIGHT_DECAY}, norm clipped at {CLIP:g}; the same for all",
            "distribution": "uniform, the first layer too",
            "schedule": f"{UPDATES}; gradual: {PRUNING}",
            "small-dense": "a dense net with as many parameters as the sparse one: state and readout smaller",
            "protocol of the paper": "RigL paper, section 4.2 and appendix I: WikiText-103, GRU 512, readout "
            "256 and 128, sequences of 512, 200,000 steps, gradual pruning from 50,000 to 150,000; its "
            "values are in a figure only: RigL and SNFS better than SET, gradual pruning better than these",
        },
        "Validation bits per character",
        {},
        look=text,
        decimals=3,
    )
