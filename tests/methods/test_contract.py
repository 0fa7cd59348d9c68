"""What holds for every method of the package, with every optimizer and kind of network, in a plain loop.

A new file in ``lightning_rigl/methods`` is found here by itself.
"""

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import lightning_rigl.methods
from lightning_rigl import Method, Sparsifier, UpdateSchedule
from tests.model.problems import MIXING, OPTIMIZERS

STEPS = 12


def methods_of_the_package():
    places = (
        f"lightning_rigl.methods.{m.name}" for m in pkgutil.iter_modules(lightning_rigl.methods.__path__)
    )
    kinds = {
        kind.__name__: kind
        for place in places
        for kind in vars(importlib.import_module(place)).values()
        if inspect.isclass(kind) and issubclass(kind, Method) and kind.__module__ == place
    }
    return {name: kind for name, kind in kinds.items() if not inspect.isabstract(kind)}


METHODS = methods_of_the_package()


class Block(nn.Module):
    """A transformer block over five words, and its mean."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x.view(-1, 5, 8)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.gru(x.view(-1, 5, 8))[0].mean(1))


def mlp():
    return nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def cnn():
    convolutions = nn.Conv1d(5, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3), nn.ReLU()
    return nn.Sequential(nn.Unflatten(1, (5, 8)), *convolutions, nn.Flatten(), nn.Linear(32, 3))


NETWORKS = {"mlp": mlp, "cnn": cnn, "transformer block": Block, "gru": Recurrent}


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(steps, 16, 40, generator=generator)
    return [(each, each[:, :3].argmax(1)) for each in x]


class Run:
    """A training, step by step."""

    def __init__(self, method, network="mlp", optimizer="sgd-nesterov", seed=3):
        torch.manual_seed(seed)
        self.model = NETWORKS[network]()
        method = METHODS[method]()
        own = method.schedule
        schedule = (
            own
            if own is None or own.begin == 0
            else UpdateSchedule(3, 0.3, begin=3, end=10, policy=own.policy)
        )
        self.sparsifier = Sparsifier(self.model, 0.7, method, schedule=schedule, seed=seed)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.sparsifier.start(STEPS)
        self.losses = []

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def step(self, step, batch):
        self.sparsifier.look(lambda model: self.loss(model, batch), example=batch[0])
        self.sparsifier.before_forward(step)
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        updated = self.sparsifier.before_step(self.optimizer, step)
        self.optimizer.step()
        self.sparsifier.after_step()
        self.losses.append(loss.item())
        return updated

    def train(self, begin=0, end=STEPS):
        for step, batch in list(enumerate(batches()))[begin:end]:
            self.step(step, batch)
        return self

    @property
    def state(self):
        masks = {name: mask.tolist() for name, mask in self.sparsifier.masks.items()}
        return {k: v.tolist() for k, v in self.model.state_dict().items()}, masks, self.losses


def check_counts(method, counts, targets, before):
    """The budget: kept exactly, or come down to and never up again."""
    kind = METHODS[method]
    if kind.latent:
        assert sum(counts.values()) <= sum(before.values()) or counts == targets
    elif kind.starts_dense:
        assert all(targets[name] <= counts[name] <= before[name] for name in counts) or kind.scope == "model"
        assert sum(targets.values()) <= sum(counts.values()) <= sum(before.values())
    elif kind.scope == "model":
        assert sum(counts.values()) == sum(targets.values())
    else:
        assert counts == targets


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in MIXING])
@pytest.mark.parametrize("method", METHODS)
def test_counts_zeros_and_optimizer_state(method, optimizer, network):
    run = Run(method, network, optimizer)
    sparsifier, kind = run.sparsifier, METHODS[method]
    targets = {name: layer.target for name, layer in sparsifier.layers.items()}
    before = dict(sparsifier.counts)
    for step, batch in enumerate(batches()):
        run.step(step, batch)
        for name, layer in sparsifier.layers.items():
            assert int(layer.mask.sum()) == layer.count
            assert (layer.parameter[~layer.mask] == 0).all()
            if not kind.latent and optimizer in ("sgd-nesterov", "adamw", "adam-amsgrad", "rmsprop-centered"):
                for key, value in run.optimizer.state.get(layer.parameter, {}).items():
                    assert key == "step" or value is None or (value[~layer.mask] == 0).all(), (key, name)
        counts = dict(sparsifier.counts)
        check_counts(method, counts, targets, before)
        before = counts
    if kind.starts_dense:
        assert sum(counts.values()) == sum(targets.values())
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_run_whatever_the_global_generator(method, network):
    first, second = Run(method, network), Run(method, network)
    before = torch.get_rng_state()
    first.train()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert second.train().state == first.state


@pytest.mark.parametrize("optimizer", ["sgd-nesterov", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pause", [1, 5, 7])
def test_a_run_that_is_saved_and_loaded_goes_on_bitwise(method, optimizer, pause):
    straight = Run(method, optimizer=optimizer).train()
    first = Run(method, optimizer=optimizer).train(end=pause)
    saved = copy.deepcopy(
        (first.model.state_dict(), first.optimizer.state_dict(), first.sparsifier.state_dict())
    )
    second = Run(method, optimizer=optimizer, seed=4)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.sparsifier.load_state_dict(saved[2])
    second.losses = first.losses
    assert second.train(begin=pause).state == straight.state


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_who_wrote_of_it_and_has_a_short_name(method):
    kind = METHODS[method]
    assert isinstance(Method.of(method.lower()), kind)
    assert "Reference:" in kind.__doc__
    assert kind.gradient in ("never", "at_updates", "every_step")
    assert inspect.getsource(inspect.getmodule(kind)).count("\n") <= 120
