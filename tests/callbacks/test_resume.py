"""A run that is resumed ends as the undisturbed one does: weights, masks, optimizer state, counters."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_rigl import RigLCallback, UpdateSchedule, load_masks
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import (
    METHODS,
    StatefulLoader,
    adamw,
    assert_consistent,
    counts,
    every_step,
    read,
    run,
    same,
    sgd,
    sparse,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint need to be provided"
)


@pytest.mark.parametrize("steps", [(3, 4, 7), pytest.param(range(1, 15), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("method", METHODS)
def test_at_any_step(method, optimizer, steps, tmp_path):
    """Before an update (3) and just after it (4), in the middle of an epoch of seven steps and at its end."""
    straight = run(tmp_path, sparse(method), module=small(optimizer=optimizer))
    assert straight["sparsity"]["updates"] == (0 if method == "static" else 3)
    for step in steps:
        resume, module = tmp_path / f"step={step}.ckpt", small(seed=1, optimizer=optimizer)
        again = run(tmp_path / "again", sparse(method, seed=9), module=module, resume=resume)
        assert same(straight, again), step


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("method", METHODS)
def test_with_accumulated_batches(method, optimizer, tmp_path):
    """Four steps an epoch, the last one of a single batch."""

    def new():
        model = small(optimizer=optimizer)
        return {"module": model, "accumulate_grad_batches": 2, "max_epochs": 3}

    straight = run(tmp_path, sparse(method), **new())
    assert (straight["global_step"], straight["epoch"]) == (12, 3)
    for step in (3, 4):
        resume = tmp_path / f"step={step}.ckpt"
        assert same(straight, run(tmp_path / "again", sparse(method), resume=resume, **new())), step


@pytest.mark.parametrize("method", METHODS)
def test_at_an_epoch_end_with_any_loader(method, tmp_path):
    straight = run(tmp_path, sparse(method), loader=data(samples=48))
    resume = tmp_path / "step=6.ckpt"  # the next step is an update
    assert same(straight, run(tmp_path / "again", sparse(method), loader=data(samples=48), resume=resume))


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_at_a_validation_within_an_epoch(method, tmp_path):
    def fit(folder, resume=None):
        keep = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)]
        return run(folder, sparse(method), keep=keep, resume=resume, val_check_interval=3, validation=data())

    straight = fit(tmp_path)
    for step in (3, 10):
        assert same(straight, fit(tmp_path / "again", tmp_path / f"step={step}.ckpt")), step


class Poison(pl.Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step in (3, 4):
            module.net[0].weight.grad.view(-1)[0] = float("inf")


def test_while_an_update_is_postponed(tmp_path):
    straight = run(tmp_path, sparse("set"), Poison(), module=small(optimizer=sgd))
    assert [read(tmp_path / f"step={n}.ckpt")["sparsity"]["updates"] for n in (4, 5, 6, 7)] == [0, 0, 1, 2]
    for step in (4, 5):
        resume = tmp_path / f"step={step}.ckpt"
        again = run(tmp_path / "again", sparse("set"), Poison(), module=small(optimizer=sgd), resume=resume)
        assert same(straight["sparsity"], again["sparsity"])


def test_with_more_epochs_the_schedule_is_the_first_runs(tmp_path):
    fraction = UpdateSchedule(every=3, end=12 / 14, drop_fraction=0.5)
    run(tmp_path, sparse(schedule=fraction))
    last = tmp_path / "step=14.ckpt"
    longer = run(tmp_path / "longer", sparse(schedule=fraction), resume=last, max_epochs=4)
    assert same(longer, run(tmp_path / "straight", sparse(), max_epochs=4))
    assert longer["global_step"] == 28


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_is_plain_data(weights_only, tmp_path):
    straight = run(tmp_path, sparse())
    loop = trainer(sparse(), max_epochs=2)
    path = tmp_path / "step=10.ckpt"
    loop.fit(small(optimizer=adamw), StatefulLoader(), ckpt_path=path, weights_only=weights_only)
    loop.save_checkpoint(tmp_path / "again.ckpt")
    assert same(straight, read(tmp_path / "again.ckpt"))


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """The last checkpoint of a sparse run."""
    folder = tmp_path_factory.mktemp("sparse")
    run(folder, sparse())
    return folder / "step=14.ckpt"


class TestMasksOfAnotherRun:
    """A checkpoint that does not fit is refused, by what does not."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sparsity": 0.7}, r"sparsity 0\.8, and this one has 0\.7"),
            ({"sparsity": {"net": 0.8}}, r"sparsity 0\.8, and this one has \{'net': 0\.8\}"),
            ({"method": "set"}, r"method RigL\(\), and this one has SET\(\)"),
            ({"distribution": "uniform"}, r"distribution ERK\(.*\), and this one has Uniform"),
            ({"exclude": ["net.2"]}, r"exclude \[\], and this one has \['net.2'\]"),
            ({"include": ["net.0"]}, r"include \[\], and this one has \['net.0'\]"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_to_resume_from(self, settings, message, last):
        with pytest.raises(ValueError, match=message):
            trainer(sparse(**settings)).fit(small(optimizer=adamw), StatefulLoader(), ckpt_path=last)

    def test_to_resume_another_model_from(self, last):
        other = small(optimizer=adamw)
        other.net[0] = nn.Linear(16, 24, bias=False)
        with pytest.raises(RuntimeError, match=r"net\.0\.bias"):  # Lightning's own
            trainer(sparse()).fit(other, StatefulLoader(), ckpt_path=last)
        other.strict_loading = False
        other.net[2] = nn.Identity()
        with pytest.raises(ValueError, match=r"do not fit the model: it has no parameter 'net\.2\.weight'"):
            trainer(sparse()).fit(other, StatefulLoader(), ckpt_path=last)

    def test_to_start_from(self, last):
        wider, renamed = small(), small()
        wider.net[0] = nn.Linear(16, 30)
        renamed.net = nn.ModuleDict({"body": renamed.net})
        for other, message in (
            (wider, r"net\.0\.weight is \(24, 16\) in the masks and \(30, 16\) in the model"),
            (renamed, r"no parameter 'net\.0\.weight', but net\.body\.0\.weight"),
        ):
            before = [p.detach().clone() for p in other.parameters()]
            with pytest.raises(ValueError, match=message):
                trainer(sparse(init=str(last))).fit(other, StatefulLoader())
            assert same(before, [p.detach() for p in other.parameters()])


class TestWeightsOnly:
    """Checkpoints with save_weights_only=True hold no masks."""

    def keep(self, folder):
        keep = every_step(folder, save_weights_only=True)
        with pytest.warns(UserWarning, match="save_weights_only=True: its checkpoints hold no masks"):
            run(folder, sparse(exclude=["net.2"]), module=small(optimizer=sgd), keep=[keep])

    def test_load_masks_says_so(self, tmp_path):
        self.keep(tmp_path)
        with pytest.raises(ValueError, match=r"holds no masks.*save_weights_only=True.*init='nonzero'"):
            load_masks(tmp_path / "step=4.ckpt")

    def test_full_ones_do_not_warn(self, tmp_path, recwarn):
        run(tmp_path, sparse())
        assert not [w for w in recwarn if "RigLCallback" in str(w.message)]

    def test_their_nonzero_weights_are_the_masks_a_while_after_an_update(self, tmp_path):
        self.keep(tmp_path / "weights")
        run(tmp_path, sparse(exclude=["net.2"]), module=small(optimizer=sgd))
        for step, complete in ((4, False), (6, True)):  # after the update at 3
            module = Small.load_from_checkpoint(tmp_path / f"weights/step={step}.ckpt", strict=True)
            rigl = sparse("static", init="nonzero", exclude=["net.2"])
            trainer(rigl, max_epochs=1).fit(module, StatefulLoader())
            for name, mask in load_masks(tmp_path / f"step={step}.ckpt").items():
                assert torch.equal(rigl.masks[name], mask) == complete
                assert not (rigl.masks[name] & ~mask).any()


def test_masks_are_kept_while_the_weights_are_fine_tuned(last, recwarn):
    module = Small.load_from_checkpoint(last)
    before = module.net[0].weight.detach().clone()
    rigl = RigLCallback(method="static", init=str(last))
    trainer(rigl, max_epochs=2).fit(module, data())
    assert same(rigl.masks, load_masks(last))
    assert rigl.sparsifier.counts == counts(last)
    assert all((module.get_parameter(name)[~mask] == 0).all() for name, mask in rigl.masks.items())
    assert not torch.equal(module.net[0].weight, before)
    assert not [w for w in recwarn if "RigLCallback" in str(w.message)]


def test_a_new_head_stays_dense_while_the_rest_is_fine_tuned(last):
    module = small()
    module.net[2] = nn.Linear(24, 10)
    rigl = RigLCallback(method="static", init=str(last), exclude=["net.2"])
    trainer(rigl, max_epochs=1).fit(module, data())
    assert same(rigl.masks, {"net.0.weight": load_masks(last)["net.0.weight"]})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


NETS = {
    "mlp": lambda: [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)],
    "cnn": lambda: [
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 4),
    ],
    "transformer": lambda: [
        nn.Unflatten(1, (4, 4)),
        nn.TransformerEncoderLayer(4, 2, 16, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 4),
    ],
    "lstm": lambda: [nn.Unflatten(1, (4, 4)), Recurrent(), nn.Linear(8, 4)],
    "adapter that starts at zero": lambda: [nn.Linear(16, 2), zeroed(nn.Linear(2, 24)), nn.Linear(24, 4)],
    "norm that starts at zero": lambda: [nn.Linear(16, 24), zeroed(nn.BatchNorm1d(24)), nn.Linear(24, 4)],
}


def model(kind):
    module = small()
    module.net = nn.Sequential(*NETS[kind]())
    return module


def trained_before(messages):
    return [str(w.message) for w in messages if "has been trained before" in str(w.message)]


class TestPretrained:
    """Random masks discard what a pretrained model has learned, those of largest magnitude keep most."""

    def test_the_largest_weights_are_kept(self):
        module = small()
        trainer(max_epochs=1).fit(module, data())
        dense = {name: p.detach().clone() for name, p in module.named_parameters()}
        starts = {}

        class Start(pl.Callback):
            def on_train_start(self, trainer, module):
                starts.update({name: p.detach().clone() for name, p in module.named_parameters()})

        rigl = sparse("static", init="magnitude")
        trainer(rigl, Start(), max_epochs=1).fit(module, data())
        for name, mask in rigl.masks.items():
            assert dense[name][mask].abs().min() >= dense[name][~mask].abs().max()
            assert torch.equal(starts[name], dense[name] * mask)

    @pytest.mark.parametrize("kind", NETS)
    def test_a_fresh_model_is_not_taken_for_one(self, kind, recwarn):
        trainer(sparse(), max_epochs=1).fit(model(kind), data())
        assert not trained_before(recwarn)

    @pytest.mark.parametrize(
        ("kind", "sign"),
        [
            ("cnn", r"net\.2 has the statistics of 8 batches"),
            ("transformer", r"net\.1\.norm1\.weight differs from its first value"),
        ],
    )
    def test_norms_that_have_trained(self, kind, sign, recwarn):
        module = model(kind)
        trainer(max_epochs=1).fit(module, data())
        with pytest.warns(UserWarning, match=rf"{sign}.*init='magnitude' keeps the largest"):
            trainer(sparse(), max_epochs=1).fit(module, data())

    def test_zeros_of_a_sparse_run(self):
        module = small()
        trainer(sparse(), max_epochs=1).fit(module, data())
        with pytest.warns(UserWarning, match=r"trained before \(net\.0\.weight has \d+ zeros\)"):
            trainer(sparse(), max_epochs=1).fit(module, data())

    def test_a_dense_checkpoint(self, last, tmp_path, recwarn):
        run(tmp_path)
        dense = tmp_path / "step=7.ckpt"
        pruned = run(tmp_path / "magnitude", sparse(init="magnitude"), resume=dense)
        assert_consistent(tmp_path / "magnitude/end.ckpt", counts(last))
        assert pruned["sparsity"]["updates"] == 1  # at 9: those at 3 and 6 are past
        assert not pruned["sparsity"]["mixing"]
        assert not trained_before(recwarn)
        with pytest.warns(UserWarning, match=r"trained before \(the checkpoint has no masks\)"):
            run(tmp_path / "random", sparse(), resume=dense)
