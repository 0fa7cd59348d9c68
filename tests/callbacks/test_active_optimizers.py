"""`ActiveSGD` and `ActiveAdamW` in a `Trainer`: state and gradients of active connections only."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rigl import ActiveAdamW, ActiveSGD, RigLCallback, UpdateSchedule
from lightning_rigl.compute import crossover
from lightning_rigl.export import unpack_checkpoint
from lightning_rigl.kernels import library
from tests.callbacks.problems import Small, data, small, trainer

pytestmark = pytest.mark.skipif(library.load() is None, reason=f"no native kernels: {library.why_not()}")
SCHEDULE = UpdateSchedule(every=4, end=30, drop_fraction=0.5)
PAIRS = {
    "SGD": (
        lambda p: ActiveSGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    ),
    "AdamW": (lambda p: ActiveAdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01, foreach=False)),
}


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Layers of any size compute natively."""
    monkeypatch.setattr(crossover, "least_rows", lambda size, connections, rule: 1)


def rigl(compute="native", **settings):
    return RigLCallback(0.7, schedule=SCHEDULE, seed=1, compute=compute, **settings)


def assert_close(one, other, exact):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_run_goes_on_with_the_optimizer_of_torch(kind, packed, tmp_path):
    active, plain = PAIRS[kind]
    straight = small(optimizer=active)
    trainer(rigl()).fit(straight, data())
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=16)
    first = trainer(rigl(pack_checkpoints=packed), saves, max_steps=16, enable_checkpointing=True)
    first.fit(small(optimizer=active), data())
    [path] = tmp_path.glob("*.ckpt")
    saved = unpack_checkpoint(torch.load(path, weights_only=True))["optimizer_states"][0]["state"]
    assert any(v.dim() == 1 and len(v) < 24 * 16 / 2 for v in saved[0].values() if v.dim()), "not compact"
    resumed = Small(plain)
    trainer(rigl()).fit(resumed, data(), ckpt_path=path)
    assert_close(resumed, straight, exact=kind == "SGD")
    dense = Small(active)  # the same optimizer, and layers that compute densely
    trainer(rigl(compute="dense")).fit(dense, data(), ckpt_path=path)
    assert_close(dense, straight, exact=False)


def test_state_of_another_number_of_connections_is_refused_in_words(tmp_path):
    active, plain = PAIRS["SGD"]
    first = trainer(rigl(), max_steps=6)
    first.fit(small(optimizer=active), data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = content["optimizer_states"][0]["state"][0]
    state["momentum_buffer"] = state["momentum_buffer"][:-1]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"net\.0\.weight: momentum_buffer holds .* active connections and the"
    ):
        trainer(rigl()).fit(Small(plain), data(), ckpt_path=tmp_path / "other.ckpt")


class Manual(Small):
    """Clips by hand, or stops in the middle of a step."""

    automatic_optimization = False
    way = "norm"

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if self.way == "crash" and batch_idx == 1:
            assert self.net[0].weight.grad.is_sparse
            raise KeyError("crash")
        if self.way == "torch":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        elif self.way != "crash":
            self.clip_gradients(optimizer, 0.1, self.way)
        optimizer.step()


def sparse_gradients(parameters):
    return ActiveSGD(parameters, 0.1, active_gradients=True)


@pytest.mark.parametrize("way", ["norm", "value", "torch"])
def test_clipping_sparse_gradients_by_hand_is_said_in_words(way):
    module = Manual(sparse_gradients)
    module.way = way
    with (
        pytest.warns(
            UserWarning, match="active_gradients=True makes sparse gradients.*leave active_gradients"
        ),
        pytest.raises((NotImplementedError, RuntimeError), match="Sparse"),
    ):
        trainer(rigl("native")).fit(module, data())


def test_other_exceptions_are_left_alone_and_gradients_are_dense_after_them(recwarn):
    module = Manual(sparse_gradients)
    module.way = "crash"
    with pytest.raises(KeyError):
        trainer(rigl()).fit(module, data())
    assert not [w for w in recwarn if "active_gradients" in str(w.message)]
    weight = module.net[0].weight
    assert weight.grad.layout == torch.strided, "a plain layer is left with a sparse gradient"
    assert 0 < weight.grad.count_nonzero() <= weight.count_nonzero()
    module(torch.randn(2, 16)).sum().backward()  # adds up


def test_a_fit_leaves_dense_gradients():
    module = small(optimizer=sparse_gradients)
    trainer(rigl(), max_steps=4).fit(module, data())
    trainer(rigl(method="static"), max_steps=2).fit(module, data())
    grads = [p.grad for p in module.parameters()]
    assert all(g is None or g.layout == torch.strided for g in grads)


class TwoNets(Small):
    """Two networks that take turns, each with an optimizer, by hand."""

    def __init__(self, make):
        super().__init__()
        self.automatic_optimization = False
        self.other, self.make = torch.nn.Linear(16, 4), make

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(net(x), y))
            optimizer.step()

    def configure_optimizers(self):
        return [self.make(self.net.parameters()), self.make(self.other.parameters())]


@pytest.mark.parametrize("active_gradients", [False, True])
def test_two_optimizers_by_hand(active_gradients):
    """The old gradient of one is there when the other updates."""
    makes = lambda p: ActiveSGD(p, 0.1, momentum=0.9, active_gradients=active_gradients), PAIRS["SGD"][1]
    modules = []
    for make, compute in zip(makes, ("native", "native"), strict=True):
        torch.manual_seed(0)
        modules.append(TwoNets(make))
        callback = rigl(compute)
        trainer(callback).fit(modules[-1], data())
        assert callback.sparsifier.updates == 2 * 7
    assert_close(*modules, exact=True)
