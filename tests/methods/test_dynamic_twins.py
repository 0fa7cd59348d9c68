"""A hundred steps of each method against its slow twin: masks identical, values to 1e-12."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.methods.deepr import DeepR
from lightning_rigl.methods.dsr import DSR
from lightning_rigl.methods.rigl_inverted import RigLInverted
from lightning_rigl.methods.rigl_sg import RigLSG
from lightning_rigl.methods.rigl_sm import RigLSM
from lightning_rigl.methods.snfs import SNFS
from lightning_rigl.methods.snfs_original import SNFSOriginal
from lightning_rigl.model.sparse_layer import private_generator
from tests.methods.dynamic_twins import Twin
from tests.model.problems import batches, network

SEED, STEPS, LR = 11, 100, 0.2
METHODS = [SNFS(0.8), SNFSOriginal(0.8), RigLSG(), RigLSM(0.8), RigLInverted(), DSR(0.1), DeepR(0.02, 1e-4)]


def draw(kind, name, step, shape):
    """The package's own numbers: places from the layer's generator, signs and noise from the next two."""
    generator = private_generator(SEED, name, step)
    following = {"grow": 0, "sign": 1, "noise": 2}[kind]
    generator.manual_seed(generator.initial_seed() + following)
    drawn = (
        torch.randn(shape, generator=generator) if kind == "noise" else torch.rand(shape, generator=generator)
    )
    return drawn.double().numpy()


@pytest.mark.parametrize("sparsity", [0.7, {"^0": 0.8, "^2": 0.1, "^4": 0.0}], ids=["erk", "nearly-dense"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_hundred_steps_equal_the_twin(method, sparsity):
    policy = method.schedule.policy
    decay = "constant" if isinstance(method, (DSR, DeepR)) else "cosine"
    every = 1 if isinstance(method, DeepR) else 7
    schedule = UpdateSchedule(every, 0.3, decay, begin=every - 1, end=90, policy=policy)
    model = network(torch.float64)
    sparsifier = Sparsifier(model, sparsity, method, schedule=schedule, seed=SEED)
    sparsifier.start(total_steps=STEPS)
    names = list(sparsifier.masks)
    twin = Twin(
        type(method).__name__.lower(),
        {name: sparsifier.parameters[name].detach().numpy().copy() for name in names},
        {name: model.get_parameter(name.replace("weight", "bias")).detach().numpy().copy() for name in names},
        {name: mask.numpy().copy() for name, mask in sparsifier.masks.items()},
        LR,
        {"every": every, "begin": every - 1, "end": 90, "alpha": 0.3, "decay": decay, "policy": policy},
        draw,
        **vars(method),
    )
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    total = sum(sparsifier.counts.values())
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    thresholds = []
    for step, (x, y) in enumerate(batches(STEPS, torch.float64)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        updated = sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        assert updated == twin.step(step, x.numpy(), y.numpy())
        for name in names:
            assert np.array_equal(sparsifier.masks[name].numpy(), twin.masks[name]), (step, name)
            weight = sparsifier.parameters[name].detach().numpy()
            np.testing.assert_allclose(weight, twin.weights[name], rtol=0, atol=1e-12)
            if "momentum" in sparsifier.layers[name].notes:
                momentum = sparsifier.layers[name].notes["momentum"].numpy()
                np.testing.assert_allclose(momentum, twin.momentum[name], rtol=0, atol=1e-12)
        assert sum(sparsifier.counts.values()) == total
        if isinstance(method, DSR):
            assert next(iter(sparsifier.numbers.values()), {}).get("threshold", 0.1) == twin.threshold
            thresholds.append(twin.threshold)
    assert sparsifier.updates == (90 if every == 1 else 12)
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    if thresholds:
        assert len(set(thresholds)) > 2  # it adapts
