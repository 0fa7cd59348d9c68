"""`RigLCallback(compute=...)`: the same training, by products that skip the zeros."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_rigl import ActiveSGD, FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.compute import crossover, mode
from lightning_rigl.compute.linear import SparseProduct
from lightning_rigl.kernels import library
from tests.callbacks.problems import Small, data, small, trainer
from tests.distributed.problems import assert_same_everywhere

SCHEDULE = UpdateSchedule(every=4, end=30, drop_fraction=0.5)


@pytest.fixture(params=["torch", "native"])
def compute(request, monkeypatch):
    if request.param == "native" and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    monkeypatch.setattr(crossover, "least_rows", lambda size, connections, rule: 1)
    return request.param


class Losses(pl.Callback):
    """What a fit came to, step by step, and whether its layers were sparse while it ran."""

    def __init__(self):
        self.losses, self.sparse = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.sparse.append(type(module.net[0]) is not nn.Linear)


def fit(compute, module=None, callbacks=(), **settings):
    module = small(optimizer=sgd) if module is None else module
    rigl, losses = RigLCallback(0.7, schedule=SCHEDULE, seed=1, compute=compute), Losses()
    trainer(rigl, losses, *callbacks, **settings).fit(module, data(), data())
    return module, rigl, losses


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_a_fit_is_that_of_masked_dense_weights(compute, settings):
    expected, rigl, dense = fit("dense", **settings)
    module, other, sparse = fit(compute, **settings)
    assert all(sparse.sparse)
    assert not any(dense.sparse)
    assert sparse.losses == pytest.approx(dense.losses, abs=1e-5)
    assert all(torch.equal(other.masks[name], mask) for name, mask in rigl.masks.items())
    assert other.sparsifier.updates == rigl.sparsifier.updates > 3
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_only_updates_compute_a_dense_gradient(compute, monkeypatch):
    """And all passes of an update's window."""
    dense = []
    given = SparseProduct.buffer
    monkeypatch.setattr(SparseProduct, "buffer", lambda self: dense.append(0) or given(self))
    _, rigl, losses = fit(compute, accumulate_grad_batches=2)
    layers = len(rigl.masks)
    assert len(dense) == layers * (len(losses.losses) - 2 * rigl.sparsifier.updates)


def test_layers_are_their_own_again_after_the_fit_and_after_an_exception(compute):
    module, _, _ = fit(compute)
    assert type(module.net[0]) is nn.Linear

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise KeyError("crash")

    module = small()
    with pytest.raises(KeyError):
        fit(compute, module, [Crash()])
    assert type(module.net[0]) is nn.Linear


def test_checkpoints_are_those_of_the_plain_module_and_a_run_is_resumed_bitwise(compute, tmp_path):
    straight, rigl, losses = fit(compute)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=16, save_top_k=-1)
    fit(compute, callbacks=[saves], max_steps=16, enable_checkpointing=True)
    [path] = tmp_path.glob("*.ckpt")
    small().load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    module, other, rest = Small(sgd), RigLCallback(0.7, schedule=SCHEDULE, compute=compute), Losses()
    trainer(other, rest).fit(module, data(), data(), ckpt_path=path)
    assert rest.losses == losses.losses[16:]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), straight.parameters(), strict=True))
    assert all(torch.equal(other.masks[name], mask) for name, mask in rigl.masks.items())


def test_a_checkpoint_may_go_on_with_another_way_to_compute(compute, tmp_path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=16)
    fit("dense", callbacks=[saves], max_steps=16, enable_checkpointing=True)
    [path] = tmp_path.glob("*.ckpt")
    _, _, expected = fit("dense")
    module, other, rest = Small(sgd), RigLCallback(0.7, schedule=SCHEDULE, compute=compute), Losses()
    trainer(other, rest).fit(module, data(), data(), ckpt_path=path)
    assert rest.losses == pytest.approx(expected.losses[16:], abs=1e-5)


def test_a_second_fit_goes_on_sparsely(compute):
    module = small(optimizer=sgd)
    rigl, first, second = RigLCallback(0.7, schedule=SCHEDULE, seed=1, compute=compute), Losses(), Losses()
    trainer(rigl, first, max_epochs=1).fit(module, data())
    trainer(rigl, second, max_epochs=1).fit(module, data())
    assert all(first.sparse)
    assert all(second.sparse)


def test_manual_optimization(compute):
    class Manual(Small):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for half in (slice(0, 4), slice(4, 8)):
                loss = nn.functional.cross_entropy(self(batch[0][half]), batch[1][half])
                self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}

    results = []
    for way in ("dense", compute):
        torch.manual_seed(0)
        results.append(fit(way, Manual(sgd)))
    (_, rigl, dense), (_, other, sparse) = results
    assert all(sparse.sparse)
    assert sparse.losses == pytest.approx(dense.losses, abs=1e-5)
    assert all(torch.equal(other.masks[name], mask) for name, mask in rigl.masks.items())


def test_mixed_precision_is_dense_in_words(compute):
    with pytest.warns(UserWarning, match="products that skip zeros are float32"):
        module, _, losses = fit(compute, precision="bf16-mixed")
    assert type(module.net[0]) is nn.Linear
    _, _, dense = fit("dense", precision="bf16-mixed")
    assert losses.losses == dense.losses


def test_flops_are_those_of_the_method_however_it_computes(compute):
    flops = [FLOPsCallback(), FLOPsCallback()]
    fit("dense", callbacks=flops[:1])
    fit(compute, callbacks=flops[1:])
    assert flops[0].report().train == flops[1].report().train


def test_other_callbacks_and_validation(compute):
    _, _, losses = fit(compute, callbacks=[EarlyStopping("val_loss", patience=20)])
    assert losses.losses[-1] < losses.losses[0]


class Same(Losses):
    """All processes have come to the same."""

    def on_train_end(self, trainer, module):
        assert all(self.sparse)
        assert_same_everywhere([p.detach() for p in module.parameters()])


def test_two_processes(compute):
    rigl = RigLCallback(0.7, schedule=SCHEDULE, seed=1, compute=compute)
    torch.set_num_threads(1)
    trainer(rigl, Same(), strategy="ddp_fork", devices=2).fit(small(optimizer=sgd), data())


def test_the_summary_says_who_computes_how(compute):
    _, rigl, _ = fit(compute)
    header, first = str(rigl.summary()).splitlines()[1:3]
    assert header.split()[-1] == "compute"
    assert first.split()[-1] == compute
    _, plain, _ = fit("dense")
    assert "compute" not in str(plain.summary())


class Convolutional(Small):
    def __init__(self, optimizer=sgd):
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 24, 3), nn.Flatten(), nn.ReLU())
        self.net.append(nn.Conv1d(1, 4, 336))

    def forward(self, x):
        return self.net[-1](self.net[:-1](x)[:, None]).flatten(1)


class Autocast(Small):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])


def said(recwarn):
    return [str(w.message) for w in recwarn if "compute=" in str(w.message)]


def test_a_model_without_a_layer_that_can_is_dense_in_words(compute, recwarn):
    fit(compute, Convolutional())
    [words] = said(recwarn)
    assert f"compute={compute!r}: all products are dense: no sparse layer is a plain torch.nn.Linear" in words


def test_autocast_in_the_training_step_is_dense_in_words(compute, recwarn):
    fit(compute, Autocast(sgd))
    [words] = said(recwarn)
    assert f"compute={compute!r}: no layer has computed sparsely" in words
    assert "torch.autocast" in words


def test_what_computes_sparsely_says_nothing(compute, recwarn):
    fit(compute)
    fit("auto", Convolutional())
    assert not said(recwarn)


@pytest.mark.parametrize(
    ("rows", "words"), [(None, "all products are dense: .* too small or too dense"), (9, "fewer rows than")]
)
def test_small_layers_and_small_batches_are_dense_in_words(compute, recwarn, monkeypatch, rows, words):
    monkeypatch.setattr(crossover, "least_rows", lambda size, connections, rule: rows)
    fit(compute)
    [found] = said(recwarn)
    assert re.search(words, found)


def test_layers_that_are_pruned_later_are_not_called_too_dense(compute, recwarn, monkeypatch):
    def rows(size, connections, rule):
        return 1 if connections < 0.5 * size else None

    monkeypatch.setattr(crossover, "least_rows", rows)
    rigl = RigLCallback(0.7, "gradual", seed=1, compute=compute)
    trainer(rigl).fit(small(optimizer=sgd), data(), data())
    assert not said(recwarn)


def test_a_missing_compiler_is_said_once(monkeypatch, compute):
    monkeypatch.setattr(mode, "native", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "there is no compiler")
    with pytest.warns(UserWarning, match="there is no compiler"):
        fit("native")


def test_another_way_to_compute_is_refused():
    with pytest.raises(ValueError, match="compute: one of dense, auto, torch, native, got 'gpu'"):
        RigLCallback(compute="gpu")


@pytest.mark.parametrize("settings", [{"gradient_clip_val": 0.5}, {"strategy": "ddp_fork", "devices": 2}])
def test_what_sparse_gradients_cannot_do_is_refused(settings):
    def make(parameters):
        return ActiveSGD(parameters, 0.1, active_gradients=True)

    with pytest.raises(Exception, match="leave active_gradients out"):
        fit("dense", small(optimizer=make), **settings)
