import pytest
import torch
from torch import nn

from lightning_rigl import Growth, Sparsifier, UpdateSchedule
from lightning_rigl.compute import mode
from lightning_rigl.kernels import library
from lightning_rigl.topology.bits import AppliedMask

STEPS = 24


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def train(compute, method="rigl", accumulate=1, make=torch.optim.SGD, nan_at=None, steps=STEPS, **settings):
    """Losses and the sparsifier of a training in a plain loop."""
    model, g = net(), torch.Generator().manual_seed(3)
    optimizer = make(model.parameters(), lr=0.05, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    settings = {"schedule": UpdateSchedule(every=3, end=18), **settings}
    sparsifier = Sparsifier(model, 0.8, method, seed=0, compute=compute, **settings)
    sparsifier.start(steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        sparsifier.before_forward(step)
        for _ in range(accumulate):
            x = torch.randn(16, 20, generator=g)
            loss = (model(x) - x[:, :4]).square().mean() / accumulate
            if step == nan_at:
                loss = loss * float("nan")
            loss.backward()
            losses.append(loss.item())
        sparsifier.before_step(optimizer, step)
        if step != nan_at:
            optimizer.step()
        sparsifier.after_step()
    sparsifier.release()
    return losses, sparsifier


@pytest.mark.parametrize(
    "method", ["rigl", "set", "snfs", "gradual", "snip", "dsr", "deepr", "dnw", "cigl", "edgepopup"]
)
def test_training_is_that_of_masked_dense_weights(method, backend, any_size):
    settings = {"schedule": None} if method in ("snip", "dnw", "deepr", "edgepopup") else {}
    dense, expected = train("dense", method, **settings)
    sparse, found = train(backend, method, **settings)
    assert sparse == pytest.approx(dense, abs=1e-5)
    assert (found.updates, found.postponed) == (expected.updates, expected.postponed)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert not found.layers.has_strays()


def test_losses_of_two_hundred_steps_are_those_of_masked_dense_weights(backend, any_size):
    schedule = UpdateSchedule(every=20, end=150)
    dense, expected = train("dense", steps=200, schedule=schedule)
    sparse, found = train(backend, steps=200, schedule=schedule)
    assert sum(dense[-20:]) < sum(dense[:20]) / 2
    assert sparse == pytest.approx(dense, abs=1e-4)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())


def test_every_pass_of_a_window_has_a_dense_gradient_where_the_step_needs_one(backend, any_size):
    dense, expected = train("dense", accumulate=3)
    sparse, found = train(backend, accumulate=3)
    assert sparse == pytest.approx(dense, abs=1e-5)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())


def test_a_postponed_update_has_its_dense_gradient_a_step_later(backend, any_size):
    """Step 3 is due, and has no finite gradient."""
    _, expected = train("dense", nan_at=3)
    _, found = train(backend, nan_at=3)
    assert found.postponed == expected.postponed == 1
    assert found.updates == expected.updates
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())


def test_growth_by_the_gradient_sees_all_of_it(backend, any_size):
    growth = Growth("gradient", divisor=10.0)
    dense, _ = train("dense", growth=growth)
    assert train(backend, growth=growth)[0] == pytest.approx(dense, abs=1e-5)


def test_an_update_that_nobody_foresaw_is_put_off_by_a_step(backend, any_size):
    """Steps are counted by another clock: the gradient of step 3 has active connections only."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, 0.8, schedule=UpdateSchedule(every=3, end=18), seed=0, compute=backend)
    sparsifier.start(STEPS)
    updated = []
    for step in (0, 3, 4):
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().mean().backward()
        updated.append(sparsifier.before_step(optimizer, step))
    assert updated == [False, False, True]


def test_the_masking_of_gradients_falls_away(backend, any_size, monkeypatch):
    """Nothing inactive is in a gradient; what the user adds there is masked all the same."""
    seen = []
    zero = AppliedMask.zero
    monkeypatch.setattr(AppliedMask, "zero", lambda self, values: seen.append(1) or zero(self, values))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, 0.8, "static", seed=0, compute=backend)
    sparsifier.start(STEPS)
    seen.clear()
    for noise, passes in ((0.0, 0), (1.0, 3)):
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().mean().backward()
        for parameter in sparsifier.parameters.values():
            if noise:
                parameter.grad.add_(noise)
        sparsifier.before_step(optimizer, 0)
        assert len(seen) == passes
        for name, mask in sparsifier.masks.items():
            assert not sparsifier.parameters[name].grad[~mask].any()


def test_start_and_release(backend, any_size):
    model = net()
    sparsifier = Sparsifier(model, 0.8, seed=0, compute=backend)
    assert type(model[0]) is nn.Linear
    sparsifier.start(100)
    assert type(model[0]) is not nn.Linear
    sparsifier.release()
    assert type(model[0]) is nn.Linear
    sparsifier.engage(10)
    assert type(model[0]) is not nn.Linear


def test_small_and_dense_layers_stay_dense(backend):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    sparsifier = Sparsifier(model, {"0.weight": 0.98, "2.weight": 0.5}, seed=0, compute=backend)
    assert [cell.split()[0] for cell in sparsifier.compute.cells.values()] == [backend, "dense"]


def test_layers_that_are_not_plain_stay_dense(any_size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.GRU(8, 8))
    sparsifier = Sparsifier(model, 0.5, seed=0, compute="torch")
    assert {k for k, b in sparsifier.compute.cells.items() if b == "torch"} == {"2.weight"}
    double = Sparsifier(nn.Sequential(nn.Linear(8, 8)).double(), 0.5, seed=0, compute="torch")
    assert double.compute.cells == {"0.weight": "dense"}
    turned = nn.Sequential(nn.Linear(8, 8))
    turned[0].weight = nn.Parameter(torch.randn(8, 8).t())
    sparsifier = Sparsifier(turned, 0.5, seed=0, compute="torch")
    assert sparsifier.compute.cells == {"0.weight": "dense"}


def test_without_native_kernels_torch_is_taken_and_it_is_said(monkeypatch, any_size):
    monkeypatch.setattr(mode, "native", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "there is no compiler")
    for compute in ("native", "auto"):
        sparsifier = Sparsifier(net(), 0.8, seed=0, compute=compute)
        assert set(sparsifier.compute.cells.values()) == {"torch"}
        [words] = sparsifier.compute.words
        assert "there is no compiler" in words


def test_another_way_to_compute_is_refused():
    with pytest.raises(ValueError, match="compute: one of dense, auto, torch, native, got 'cuda'"):
        Sparsifier(net(), compute="cuda")


def test_layers_that_become_sparse_or_dense_in_training_are_looked_at_again(backend):
    """Gradual pruning starts dense; here its layer is sparse enough after the last update."""
    model = nn.Sequential(nn.Linear(512, 512))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = UpdateSchedule(every=2, begin=0, end=6, policy="after_step")
    sparsifier = Sparsifier(model, 0.97, "gradual", schedule=schedule, seed=0, compute=backend)
    sparsifier.start(8)
    cells = []
    for step in range(8):
        cells.append(sparsifier.compute.cells["0.weight"].split()[0])
        optimizer.zero_grad()
        model(torch.randn(300, 512)).square().mean().backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    assert cells[0] == "dense"
    assert cells[-1] == backend
    product = sparsifier.layers["0.weight"].product
    assert product.fits(torch.randn(300, 512), model[0].weight)


def test_a_gradient_that_was_changed_through_data_is_masked(backend, any_size):
    """Such a change bumps no version counter."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, 0.8, "static", seed=0, compute=backend)
    sparsifier.start(STEPS)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().mean().backward()
        if step == 1:
            for parameter in sparsifier.parameters.values():
                parameter.grad.data.add_(1.0)
        sparsifier.before_step(optimizer, step)
        for name, mask in sparsifier.masks.items():
            assert not sparsifier.parameters[name].grad[~mask].any()
        optimizer.step()
        assert not sparsifier.layers.has_strays()
