import copy

import pytest
import torch
from torch import nn

from lightning_rigl import Growth, Sparsifier, UpdateSchedule
from lightning_rigl.compute.optimizers import ActiveAdamW, ActiveSGD
from lightning_rigl.kernels import library
from lightning_rigl.model import mask_files

pytestmark = pytest.mark.skipif(library.load() is None, reason=f"no native kernels: {library.why_not()}")
STEPS = 24
SGDS = [
    {"lr": 0.05},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]
ADAMS = [{"lr": 0.01}, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def train(make, method="rigl", compute="native", stop=STEPS, saved=None, **settings):
    """The model, optimizer and sparsifier of a training; ``saved``: go on from these states."""
    model = net()
    optimizer = make(model.parameters())
    settings = {"schedule": UpdateSchedule(every=3, end=18), **settings}
    sparsifier = Sparsifier(model, 0.8, method, seed=0, compute=compute, **settings)
    first = 0
    if saved:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        sparsifier.load_state_dict(saved[2])
        first = saved[3]
        sparsifier.engage(first)
    else:
        sparsifier.start(STEPS)
    for step in range(first, stop):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    return model, optimizer, sparsifier


def assert_equal(one, other, exact=True):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("active_gradients", [False, True])
@pytest.mark.parametrize("settings", SGDS, ids=str)
@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_sgd_is_torchs_bit_by_bit(any_size, settings, active_gradients, method):
    expected, _, dense = train(lambda p: torch.optim.SGD(p, foreach=False, **settings), method)
    found, _, sparse = train(lambda p: ActiveSGD(p, **settings, active_gradients=active_gradients), method)
    assert sparse.updates == dense.updates
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in dense.masks.items())
    assert_equal(found, expected)


@pytest.mark.parametrize("active_gradients", [False, True])
@pytest.mark.parametrize("settings", ADAMS, ids=str)
def test_adamw_is_torchs(any_size, settings, active_gradients):
    expected, _, dense = train(lambda p: torch.optim.AdamW(p, foreach=False, **settings))
    found, _, sparse = train(lambda p: ActiveAdamW(p, **settings, active_gradients=active_gradients))
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in dense.masks.items())
    assert_equal(found, expected, exact=False)


@pytest.mark.parametrize("make", [lambda p: ActiveSGD(p, 0.1, 0.9), lambda p: ActiveAdamW(p, 0.01)])
def test_state_covers_active_connections_only(any_size, make):
    _, optimizer, sparsifier = train(make)
    for name, parameter in sparsifier.parameters.items():
        sizes = {v.numel() for v in optimizer.state[parameter].values() if v.dim()}
        assert sizes == {sparsifier.counts[name]}


def test_elsewhere_it_is_torchs_own():
    """Nothing computes natively here."""
    settings = {"lr": 0.05, "momentum": 0.9}
    expected, _, _ = train(lambda p: torch.optim.SGD(p, foreach=False, **settings), compute="dense")
    found, _, _ = train(lambda p: ActiveSGD(p, **settings), compute="dense")
    assert_equal(found, expected)


@pytest.mark.parametrize("stop", [8, 9, 10])
@pytest.mark.parametrize("make", [lambda p: ActiveSGD(p, 0.1, 0.9), lambda p: ActiveAdamW(p, 0.01)])
def test_a_run_is_resumed_bitwise(any_size, make, stop):
    """Before, right after and a step after an update."""
    expected, _, _ = train(make)
    model, optimizer, sparsifier = train(make, stop=stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict(), stop))
    found, _, _ = train(make, saved=saved)
    assert_equal(found, expected)


def test_the_state_of_a_dense_run_is_taken_over(any_size):
    settings = {"lr": 0.05, "momentum": 0.9}
    expected, _, _ = train(lambda p: torch.optim.SGD(p, foreach=False, **settings))
    model, optimizer, sparsifier = train(lambda p: torch.optim.SGD(p, **settings), stop=10)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict(), 10))
    found, _, _ = train(lambda p: ActiveSGD(p, **settings), saved=saved)
    assert_equal(found, expected)


def test_state_of_active_connections_is_refused_where_the_layer_computes_densely(any_size):
    make = lambda p: ActiveSGD(p, 0.1, 0.9)  # noqa: E731
    model, optimizer, sparsifier = train(make, stop=10)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict(), 10))
    with pytest.raises(RuntimeError, match="go on with compute='native'"):
        train(make, compute="dense", saved=saved)


def test_hooks_run_once_a_step(any_size):
    seen = []

    def make(parameters):
        optimizer = ActiveSGD(parameters, 0.1)
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)  # torch hooks the class when one is made
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))
        return optimizer

    train(make, "static", stop=3)
    assert seen == ["pre", "post"] * 3


def test_passes_of_a_window_add_up_as_sparse_gradients(any_size):
    results = []
    for active in (False, True):
        model = net()
        optimizer = ActiveSGD(model.parameters(), 0.1, 0.9, active_gradients=active)
        sparsifier = Sparsifier(model, 0.8, "static", seed=0, compute="native")
        sparsifier.start(4)
        for step in range(4):
            optimizer.zero_grad()
            for part in (0, 1):
                x = torch.randn(8, 20, generator=torch.Generator().manual_seed(2 * step + part))
                model(x).square().mean().backward()
            sparsifier.before_step(optimizer, step)
            optimizer.step()
        results.append(model)
    assert_equal(*results, exact=False)


def test_growth_may_give_state_to_new_connections_only_densely(any_size):
    with pytest.raises(ValueError, match="momentum"):
        train(lambda p: ActiveSGD(p, 0.1, 0.9), growth=Growth(momentum=0.5))


def test_regrown_connections_are_fresh_on_request(any_size):
    settings = {"lr": 0.05, "momentum": 0.9}
    growth = Growth("normal", regrown=True)
    expected, _, _ = train(lambda p: torch.optim.SGD(p, foreach=False, **settings), "set", growth=growth)
    found, _, _ = train(lambda p: ActiveSGD(p, **settings), "set", growth=growth)
    assert_equal(found, expected)


@pytest.mark.parametrize("method", ["dnw", "edgepopup", "gemminer"])
@pytest.mark.parametrize("pair", [(torch.optim.SGD, ActiveSGD), (torch.optim.AdamW, ActiveAdamW)])
def test_methods_that_train_something_else_are_stepped_by_torch(any_size, method, pair):
    dense, active = (train(lambda p, make=make: make(p, lr=0.05), method, schedule=None)[0] for make in pair)
    assert_equal(active, dense)


def test_state_follows_masks_that_were_loaded(any_size):
    """Of the same number of connections: only their places tell."""
    make = lambda p: ActiveSGD(p, 0.1, 0.9)  # noqa: E731
    _, _, other = train(make, stop=10)
    model, optimizer, sparsifier = train(make, stop=10)
    buffers, parameters = optimizer.state, sparsifier.parameters
    before = {name: buffers[p]["momentum_buffer"].clone() for name, p in parameters.items()}
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    moved = {name: mask.view(-1).roll(1).view(mask.shape) for name, mask in masks.items()}
    sparsifier.load_state_dict({**other.state_dict(), "masks": mask_files.pack_masks(moved)})
    sparsifier.engage(10)
    optimizer.zero_grad()
    model(torch.zeros(4, 20)).sum().backward()
    sparsifier.before_step(optimizer, 10)
    optimizer.step()
    for name, p in sparsifier.parameters.items():
        momentum = torch.zeros_like(p)
        momentum[moved[name]] = optimizer.state[p]["momentum_buffer"]
        old = torch.zeros_like(p)
        old[masks[name]] = before[name]
        both = masks[name] & moved[name]
        if name == "0.weight":  # its inputs are zero: no gradient was added
            torch.testing.assert_close(momentum[both], 0.9 * old[both])
            assert not momentum[moved[name] & ~masks[name]].any()
