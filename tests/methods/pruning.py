"""A training loop in plain PyTorch for the methods that prune, and their slow twin: sorted Python lists."""

import torch
from torch import nn

from lightning_rigl import Sparsifier
from tests.model.problems import batches, network

NAMES = ("0.weight", "2.weight", "4.weight")  # of `network`: 16 x 12, 8 x 16, 4 x 8
TARGETS = {"0.weight": 48, "2.weight": 32, "4.weight": 8}  # a quarter of each
QUARTER = {"0": 0.75, "2": 0.75, "4": 0.75}


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def training(method, steps=24, schedule=None, sparsity=QUARTER, model=None, optimizer=momentum, **settings):
    """Trains in float64; gives the sparsifier before the first step and after each one."""
    model = network(torch.float64) if model is None else model
    optimizer = optimizer(model.parameters())
    sparsifier = Sparsifier(model, sparsity, method, schedule=schedule, seed=0, **settings)
    sparsifier.start(steps)
    data = batches(steps, torch.float64)
    sparsifier.look(lambda twin: loss_of(twin, data[0]), data[0][0])
    yield sparsifier
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        yield sparsifier


def last(run):
    """What a run ends with."""
    for sparsifier in run:
        end = sparsifier
    return end


def snapshot(sparsifier):
    return {name: mask.clone() for name, mask in sparsifier.masks.items()}


def lowest(scores, masks, count):
    """The masks left when the ``count`` lowest-scored active connections of all given layers are dropped.

    Of equal scores the later layer loses first, and in a layer the higher index.
    """
    ranked = sorted(
        (float(scores[name].reshape(-1)[i]), -place, -i)
        for place, name in enumerate(scores)
        for i in range(scores[name].numel())
        if masks[name].reshape(-1)[i]
    )
    left = {name: masks[name].clone() for name in scores}
    for _, place, i in ranked[:count]:
        left[list(scores)[-place]].view(-1)[-i] = False
    return left
