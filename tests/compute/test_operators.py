"""What torch's compilers and counters see of a sparse product."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.compute.linear import SparseProduct


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


def product(backend, outputs=9, inputs=6):
    mask = torch.rand(outputs, inputs) < 0.4
    weight = nn.Parameter(torch.randn(outputs, inputs) * mask)
    return SparseProduct(weight, mask, backend)


def test_torchs_own_checks_of_an_operator(backend):
    found = product(backend)
    s, x = found.structure, torch.randn(5, 6)
    weight = found.parameter.detach()
    forward = torch.ops.lightning_rigl.linear_forward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (x, weight, torch.randn(9), s.tensors, backend), test_utils=tests)
    _, kept, values = forward(x, weight, None, s.tensors, backend)
    backward = torch.ops.lightning_rigl.linear_backward.default
    for into in (None, torch.zeros_like(weight)):
        arguments = (torch.randn(5, 9), kept, values, s.tensors, True, True, into, backend)
        torch.library.opcheck(backward, arguments, test_utils=tests)


def test_flops_are_those_of_the_connections(backend):
    found = product(backend)
    count, x = found.structure.count, torch.randn(5, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        found(x, None).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * count
    found.dense_gradient = True
    with FlopCounterMode(display=False) as counter:
        found(x, None).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * count + 2 * 5 * 9 * 6


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_training_is_the_eager_one_and_is_compiled_twice(backend, any_size, compiler):
    """Once for steps, once for updates, which need the dense gradient."""

    def train(compute, compiler=None):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = UpdateSchedule(every=3, end=20)
        sparsifier = Sparsifier(model, 0.8, schedule=schedule, seed=0, compute=compute)
        sparsifier.start(30)
        counter = CompileCounterWithBackend(compiler or "eager")
        run = torch.compile(model, backend=counter, fullgraph=True) if compiler else model
        losses, generator = [], torch.Generator().manual_seed(3)
        for step in range(30):
            optimizer.zero_grad()
            loss = run(torch.randn(16, 40, generator=generator)).square().mean()
            loss.backward()
            losses.append(loss.item())
            sparsifier.before_step(optimizer, step)
            optimizer.step()
            sparsifier.after_step()
        return losses, sparsifier, counter.frame_count

    dense, expected, _ = train("dense")
    losses, found, compiled = train(backend, compiler)
    assert losses == pytest.approx(dense, abs=1e-6)
    assert (found.updates, found.postponed) == (expected.updates, 0)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert compiled == 2
