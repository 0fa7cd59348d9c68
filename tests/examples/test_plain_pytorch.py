"""The Sparsifier in loops that are not Lightning's Trainer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_rigl import Sparsifier, UpdateSchedule

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _repository_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def inactive_are_zero(sparsifier):
    return all((p[~sparsifier.masks[n]] == 0).all() for n, p in sparsifier.parameters.items())


def test_the_example_prints_accuracy_density_and_updates():
    script = str(ROOT / "examples" / "plain_pytorch.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[:3]]
    assert [(method, updates) for method, _, _, _, _, updates, *_ in lines] == [
        ("static", "0"),
        ("set", "33"),
        ("rigl", "33"),
    ]
    accuracy = {line[0]: float(line[2]) for line in lines}
    assert min(accuracy["set"], accuracy["rigl"]) > accuracy["static"] + 0.1
    assert all(line[4] == "0.0200" for line in lines)


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_the_loop_of_the_example_keeps_the_model_sparse(method):
    from examples.plain_pytorch import train

    accuracy, sparsifier = train(method, sparsity=0.8, epochs=3)
    assert accuracy > 0.8
    assert inactive_are_zero(sparsifier)
    assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == 10_041  # 50,200 minus three floors
    again = train(method, sparsity=0.8, epochs=3)[1].masks
    assert all(torch.equal(mask, again[name]) for name, mask in sparsifier.masks.items())


def digits_run(make_optimizer, fabric=None, steps=30, every=10):
    """Train on the digits, in a plain loop or in Fabric's; it is the unwrapped model that becomes sparse."""
    from examples.plain_pytorch import digits

    images, labels, *_ = digits()
    model = net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = make_optimizer(net.parameters())
    if fabric:
        model, optimizer = fabric.setup(net, optimizer)
    sparsifier = Sparsifier(net, 0.8, schedule=UpdateSchedule(every=every), seed=0)
    sparsifier.start(total_steps=steps)
    losses = []
    for step in range(steps):
        chosen = torch.arange(step * 32, (step + 1) * 32) % len(images)
        optimizer.zero_grad()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        fabric.backward(loss) if fabric else loss.backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        assert inactive_are_zero(sparsifier)
        losses.append(loss.item())
    return sparsifier, optimizer, losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_a_fabric_loop(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    sparsifier, _, losses = digits_run(lambda p: torch.optim.AdamW(p, lr=1e-2), fabric)
    assert sparsifier.updates == 2
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert sparsifier.counts == {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}


def test_a_fabric_loop_equals_the_plain_one():
    runs = []
    for fabric in (None, Fabric(accelerator="cpu", devices=1)):
        torch.manual_seed(1)
        runs.append(digits_run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), fabric))
    (plain, _, losses), (wrapped, _, same_losses) = runs
    assert losses == same_losses
    for name, mask in plain.masks.items():
        assert torch.equal(mask, wrapped.masks[name])
        momentum, same = (o.state[s.parameters[name]]["momentum_buffer"] for s, o, _ in runs)
        assert torch.equal(momentum, same)


def test_the_state_of_a_wrapped_optimizer_becomes_fresh():
    fabric = Fabric(accelerator="cpu", devices=1)
    adagrad = digits_run(lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5), fabric)
    sparsifier, optimizer, _ = adagrad
    for name, parameter in sparsifier.parameters.items():
        assert (optimizer.state[parameter]["sum"][~sparsifier.masks[name]] == 0.5).all()
