"""Whole training runs against the slow twin: masks identical, values to 1e-12."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.model.sparse_layer import private_generator
from tests import reference
from tests.model.problems import batches, network

SEED = 11
OPTIMIZERS = {
    "sgd": (
        lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, weight_decay=1e-2),
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2},
    ),
    "sgd-nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.05), {"lr": 0.01, "weight_decay": 0.05}),
}


def random_scores(name, step, shape):
    return torch.rand(shape, generator=private_generator(SEED, name, step)).numpy()


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["cosine", "inverse_power"])
def test_two_hundred_steps_equal_the_twin(method, optimizer_name, decay):
    compare_with_the_twin(method, optimizer_name, decay, steps=200, updates=12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_thousand_steps_equal_the_twin(method, optimizer_name):
    compare_with_the_twin(
        method, optimizer_name, "linear", steps=1000, updates=62, tolerance=1e-9
    )  # rounding grows


def compare_with_the_twin(method, optimizer_name, decay, steps, updates, tolerance=1e-12):
    make, hyper = OPTIMIZERS[optimizer_name]
    model = network(torch.float64)
    schedule = UpdateSchedule(every=12, end=0.75, decay=decay, drop_fraction=0.4)
    sparsifier = Sparsifier(model, 0.7, method, schedule=schedule, seed=SEED)
    sparsifier.start(total_steps=steps)
    data = batches(steps, torch.float64)
    names = list(sparsifier.masks)
    twin = reference.train(
        {name: sparsifier.parameters[name].detach().numpy().copy() for name in names},
        {name: model.get_parameter(name.replace("weight", "bias")).detach().numpy().copy() for name in names},
        {name: mask.numpy().copy() for name, mask in sparsifier.masks.items()},
        [(x.numpy(), y.numpy()) for x, y in data],
        method=method,
        optimizer="adamw" if optimizer_name == "adamw" else "sgd",
        hyper=hyper,
        schedule={"every": 12, "begin": 12, "end": steps * 3 // 4, "alpha": 0.4, "decay": decay},
        random_scores=random_scores,
    )
    optimizer = make(model.parameters())
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        updated = sparsifier.before_step(optimizer, step)
        optimizer.step()
        assert updated == twin[step].updated
        for name in names:
            assert np.array_equal(sparsifier.masks[name].numpy(), twin[step].masks[name])
            weight = sparsifier.parameters[name].detach().numpy()
            np.testing.assert_allclose(weight, twin[step].weights[name], rtol=0, atol=tolerance)
    assert sparsifier.updates == (0 if method == "static" else updates)
