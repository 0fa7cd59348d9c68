"""DNW: all weights are trained with the dense gradient, and the largest are used.

index      0     1     2     3     4     5
variable 0.5  -0.1   0.3  -0.4   0.05  0.3     three connections: 0, 3, and of the equal 2 and 5 the lower
"""

import pytest
import torch
from torch import nn

from lightning_rigl import FLOPsCallback, RigLCallback
from lightning_rigl.methods.base import Connections, Moment
from lightning_rigl.methods.dnw import DNW
from tests.callbacks.flops_problems import F_D, Silent
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import adamw, run, same, sgd
from tests.methods.pruning import NAMES, TARGETS, loss_of, lowest, momentum, snapshot, training
from tests.model.problems import batches, network


def test_by_hand():
    variable = torch.tensor([0.5, -0.1, 0.3, -0.4, 0.05, 0.3])
    layer = Connections(variable, torch.zeros(6).bool(), None, torch.Generator(), target=3)
    ((mask, values),) = DNW().project([layer], [variable], Moment(0))
    assert mask.nonzero().view(-1).tolist() == [0, 2, 3]
    assert values is variable


def twin(steps, make):
    """A dense variable v, and a network of its largest values: v <- v - rate * dL/dw at w = v * mask(v)."""
    model, dense = network(torch.float64), network(torch.float64)
    optimizer = make(dense.parameters())
    for batch in [*batches(steps, torch.float64), None]:
        masks = {}
        for name in NAMES:
            score = {name: dense.get_parameter(name).detach().abs()}
            full = {name: torch.ones_like(score[name]).bool()}
            masks |= lowest(score, full, full[name].numel() - TARGETS[name])
        for name, parameter in model.named_parameters():
            value = dense.get_parameter(name).data
            parameter.data = value * masks[name] if name in masks else value.clone()
        yield model, masks
        if batch:
            grads = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
            for parameter, grad in zip(dense.parameters(), grads, strict=True):
                parameter.grad = grad
            optimizer.step()


def decaying(parameters):
    return torch.optim.AdamW(parameters, 0.02, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [momentum, decaying])
def test_every_step_is_that_of_a_slow_twin(optimizer):
    model, changes, before = network(torch.float64), 0, None
    ours = training("dnw", 20, model=model, optimizer=optimizer)
    for sparsifier, (expected, masks) in zip(ours, twin(20, optimizer), strict=True):
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name
        assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in masks.items())
        assert sparsifier.counts == TARGETS
        if before is not None:
            changes += any((mask ^ before[name]).any() for name, mask in masks.items())
        before = snapshot(sparsifier)
    assert changes > 10


def test_ties_do_not_change_a_count():
    model = network(torch.float64)
    for name in NAMES:
        nn.init.constant_(model.get_parameter(name), 0.5)
    sparsifier = next(training("dnw", 1, model=model))
    assert sparsifier.counts == TARGETS
    assert all(mask.view(-1)[: TARGETS[name]].all() for name, mask in sparsifier.masks.items())


def test_flops_every_step_takes_the_dense_gradient():
    sparse, counter = RigLCallback(0.8, "dnw"), FLOPsCallback()
    trainer(sparse, counter, max_epochs=2).fit(Silent(), data())
    assert counter.report().forward == 196
    assert counter.report().train == 2 * 64 * (2 * 196 + F_D)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_a_resumed_run_ends_as_the_undisturbed_one(optimizer, tmp_path):
    straight = run(tmp_path, RigLCallback(0.8, "dnw"), module=small(optimizer=optimizer))
    for step in (1, 7, 9):
        resume, module = tmp_path / f"step={step}.ckpt", small(seed=1, optimizer=optimizer)
        again = run(tmp_path / "again", RigLCallback(0.8, "dnw"), module=module, resume=resume)
        assert same(straight, again), step
