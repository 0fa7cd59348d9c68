"""On CUDA: what is chosen there is what is chosen on the CPU, and an ordinary step waits for nothing."""

import os

import pytest
import torch
from torch import nn

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.topology import bits, selection
from tests.callbacks.problems import data, small, trainer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

DEVICE = "cuda"
SCHEDULE = UpdateSchedule(every=5, end=24, drop_fraction=0.5)
METHODS = pytest.mark.parametrize("method", ["rigl", "set", "static"])


def scores(kind, dtype, size=120_000):
    """Large enough for the path that draws a sample."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if kind == "ties":
        values = (2 * values).round()
    if kind == "special":
        values[::7], values[1::7], values[2::7], values[3::7] = torch.nan, torch.inf, -torch.inf, -0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "special"])
@pytest.mark.parametrize("count", [1, 9_000, 59_000])
def test_selection_is_that_of_the_cpu(kind, dtype, count):
    values, among = scores(kind, dtype), torch.arange(120_000) % 3 != 0
    there = selection.top(values.to(DEVICE), count, among.to(DEVICE))
    assert there.device.type == DEVICE
    assert torch.equal(there.cpu(), selection.top(values, count, among))
    assert bits.digest(there) == bits.digest(there.cpu())


def run(method, dtype, device, init="random"):
    """A run with one rounding an operation on any device: given gradients, powers of two for factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 4)).to(dtype).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.125, momentum=0.5)
    sparsifier = Sparsifier(model, 0.8, method, schedule=SCHEDULE, init=init, seed=1)
    sparsifier.start()
    generator = torch.Generator().manual_seed(2)
    for step in range(30):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.to(dtype).to(device)
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    assert sparsifier.updates == (0 if method == "static" else 4)
    saved = {**model.state_dict(), **{f"mask of {name}": m for name, m in sparsifier.masks.items()}}
    assert all(values.device.type == device for values in saved.values())
    return {name: values.cpu() for name, values in saved.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(v, second[name]) for name, v in first.items())


@METHODS
@pytest.mark.parametrize("init", ["random", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_run_is_that_of_the_cpu(method, dtype, init):
    assert same(run(method, dtype, DEVICE, init), run(method, dtype, "cpu", init))


@METHODS
def test_deterministic_mode(method):
    expected = run(method, torch.float32, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        again = run(method, torch.float32, DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(expected, again)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_ordinary_step_does_not_wait_for_the_device(optimizer):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)
    own, batch = optimizer(model.parameters(), 0.01), torch.randn(16, 64, device=DEVICE)
    sparsifier = Sparsifier(model, 0.9, schedule=UpdateSchedule(every=10, end=30))
    sparsifier.start()
    try:
        for step in range(10):
            model(batch).square().mean().backward()
            # the first step looks whether the optimizer moves inactive weights
            torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
            assert not sparsifier.before_step(own, step)
            torch.cuda.set_sync_debug_mode("default")
            own.step()
            torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
            sparsifier.after_step()
            torch.cuda.set_sync_debug_mode("default")
            own.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@METHODS
@pytest.mark.parametrize(
    "arguments",
    [{}, {"precision": "16-mixed"}, {"precision": "bf16-mixed"}, {"deterministic": True}],
    ids=str,
)
def test_a_fit_keeps_zeros_and_counts(method, arguments):
    module, rigl = small(), RigLCallback(0.8, method, schedule=SCHEDULE)
    try:
        trainer(rigl, accelerator="gpu", devices=1, **arguments).fit(module, data())
    finally:
        torch.use_deterministic_algorithms(False)
    # every fifth step before 24; with a scaler, one that came with a gradient too large is done later
    assert rigl.sparsifier.updates == (0 if method == "static" else 4)
    for name, mask in rigl.masks.items():
        assert int(mask.sum()) == rigl.sparsifier.counts[name]
        assert (module.get_parameter(name).cpu()[~mask.cpu()] == 0).all()


def test_masks_follow_the_module_from_device_to_device():
    module, rigl = small(), RigLCallback(0.8, "static")
    seen = []
    for accelerator in ("gpu", "cpu", "gpu"):
        trainer(rigl, accelerator=accelerator, devices=1, max_epochs=1).fit(module, data())
        seen.append({name: mask.cpu() for name, mask in rigl.masks.items()})
        for name, mask in seen[-1].items():
            assert (module.get_parameter(name).cpu()[~mask] == 0).all()
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])
