"""torch.compile: the training is the same, names are clean, and no update compiles anything anew."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.model.layers import clean_name
from tests.callbacks.problems import Small, data, trainer

SCHEDULE = UpdateSchedule(every=4, end=30, drop_fraction=0.5)
NAMES = ["net.first.weight", "net.last.weight"]
PLACES = ["inner", "configure_model", "in place"]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


class Net(nn.Module):
    """No nn.Sequential: its own ``compile()`` does nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Compiled(Small):
    """Its net is compiled in one of three places, or not at all."""

    def __init__(self, place=None, backend=None):
        super().__init__()
        self.place, self.backend = place, backend
        self.net = None if place == "configure_model" else self.make_net()

    def configure_model(self):
        if self.net is None:
            self.net = self.make_net()

    def make_net(self):
        net = Net().double()
        if self.place == "in place":
            net.compile(backend=self.backend)
            return net
        return torch.compile(net, backend=self.backend) if self.place else net


class Count(pl.Callback):
    """Frames compiled up to the end of each batch."""

    def __init__(self, backend):
        self.backend, self.frames = backend, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.frames.append(self.backend.frame_count)


def fit(module, *callbacks, validate=True, resume=None, epochs=4):
    rigl = RigLCallback(0.5, schedule=SCHEDULE, seed=1)
    loader = data(dtype=torch.float64)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer(rigl, *callbacks, max_epochs=epochs, enable_checkpointing=saves).fit(
        module, loader, loader if validate else None, ckpt_path=resume
    )
    assert list(rigl.masks) == NAMES
    assert rigl.sparsifier.updates == 7
    return rigl


def same_masks(first, second):
    return all(torch.equal(first.masks[name], second.masks[name]) for name in NAMES)


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *((place, "aot_eager") for place in PLACES),
        pytest.param("inner", "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_same_training_and_nothing_compiled_at_an_update(place, name):
    plain, backend = Compiled(), CompileCounterWithBackend(name)
    module, count = Compiled(place, backend), Count(backend)
    rigl = fit(plain), fit(module, count)
    assert same_masks(*rigl)
    if name == "inductor":  # it adds in another order
        for a, b in zip(plain.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    else:
        assert same_weights(plain, module)
    assert count.frames == [2] * 32  # one to validate, in the sanity check, and one to train


@pytest.mark.parametrize("place", PLACES)
def test_the_state_of_a_compiled_run_fits_the_model_that_is_not(place, tmp_path):
    module = Compiled(place, "eager")
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    rigl = fit(module, keep)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    state = saved["callbacks"]["RigLCallback"]
    assert list(state["masks"]) == NAMES
    Sparsifier(Compiled(), 0.5, seed=2).load_state_dict(state)

    saved["state_dict"] = {clean_name(name): value for name, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "plain.ckpt")
    plain = Compiled()
    assert same_masks(fit(plain, resume=tmp_path / "plain.ckpt"), rigl)
    assert same_weights(plain, module)


def test_a_run_of_the_model_that_is_not_compiled_goes_on_compiled_in_place(tmp_path):
    plain = Compiled()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    rigl = fit(plain, keep)
    module = Compiled("in place", "eager")
    assert same_masks(fit(module, resume=tmp_path / "epoch=1.ckpt"), rigl)
    assert same_weights(plain, module)


def test_a_compiled_lightning_module():
    """Without self.log, which torch.compile does not get through in Lightning 2.6 with torch 2.13."""

    class Quiet(Compiled):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    plain, module, backend = Quiet(), Quiet(), CompileCounterWithBackend("aot_eager")
    count = Count(backend)
    rigl = fit(plain, validate=False), fit(torch.compile(module, backend=backend), count, validate=False)
    assert same_masks(*rigl)
    assert same_weights(plain, module)
    assert count.frames[3:] == count.frames[3:4] * 29  # before the first update, at step 4
