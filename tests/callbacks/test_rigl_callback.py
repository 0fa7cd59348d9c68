"""RigLCallback inside the real Trainer."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from lightning_rigl import ERK, RigLCallback, Sparsifier, UpdateSchedule
from tests.callbacks.problems import Small, data, small, trainer
from tests.model.problems import Noisy

SCHEDULE = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5)


class Watch(pl.Callback):
    """What holds after each batch: the zeros, the counts, and the step at which each update came."""

    def __init__(self, rigl):
        self.rigl, self.updates, self.weights = rigl, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        sparsifier = self.rigl.sparsifier
        for name, mask in self.rigl.masks.items():
            assert int(mask.sum()) == sparsifier.counts[name]
            assert (module.get_parameter(name)[~mask] == 0).all()
        if sparsifier.updates > len(self.updates):
            self.updates.append(trainer.global_step - 1)
        self.weights.append(module.net[0].weight.detach().clone())


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_a_fit_keeps_the_zeros_and_updates_on_the_grid(method):
    rigl = RigLCallback(0.8, method, schedule=SCHEDULE)
    watch = Watch(rigl)
    trainer(rigl, watch).fit(small(), data())
    assert watch.updates == ([] if method == "static" else [6, 12, 18, 24])
    for step in watch.updates:
        changed = watch.weights[step] != watch.weights[step - 1]
        assert (watch.weights[step][changed] == 0).all()  # dropped, and nothing else moved


def test_the_trainer_equals_a_plain_loop():
    module, rigl = small(dtype=torch.float64), RigLCallback(0.8, schedule=SCHEDULE, seed=4)
    trainer(rigl).fit(module, data(dtype=torch.float64))
    plain = small(dtype=torch.float64)
    sparsifier = Sparsifier(plain, 0.8, schedule=SCHEDULE, seed=4)
    sparsifier.start(total_steps=40)
    optimizer = plain.configure_optimizers()
    step = 0
    for _ in range(5):
        for x, y in data(dtype=torch.float64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            sparsifier.before_step(optimizer, step)
            optimizer.step()
            sparsifier.after_step()
            step += 1
    assert equal(weights(module), weights(plain))
    assert all(torch.equal(rigl.masks[k], sparsifier.masks[k]) for k in rigl.masks)


def test_the_model_is_sparse_from_the_first_forward_and_in_the_sanity_check():
    class Look(Small):
        densities = []  # noqa: RUF012

        def forward(self, x):
            self.densities.append(float((self.net[0].weight != 0).float().mean()))
            return super().forward(x)

    trainer(RigLCallback(0.8), max_epochs=1, num_sanity_val_steps=2).fit(Look(), data(), data())
    assert max(Look.densities) < 0.2


def test_the_order_of_the_hooks():
    """The dense gradient is there when an update chooses; what is clipped, and stepped with, is masked."""
    seen = []

    class Order(Small):
        def on_after_backward(self):
            seen.append(("backward", self.inactive_gradient()))

        def configure_gradient_clipping(self, *arguments, **settings):
            seen.append(("clip", self.inactive_gradient()))
            super().configure_gradient_clipping(*arguments, **settings)

        def optimizer_step(self, *arguments, **settings):
            super().optimizer_step(*arguments, **settings)
            seen.append(("step", self.inactive_gradient()))

        def inactive_gradient(self):
            grad = self.net[0].weight.grad
            return None if grad is None else bool((grad[~rigl.masks["net.0.weight"]] != 0).any())

    rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=2, end=8))
    trainer(rigl, max_steps=3, gradient_clip_val=1.0).fit(Order(), data())
    ordinary = [("backward", True), ("clip", False), ("step", False)]
    update = [("backward", True), ("clip", None), ("step", None)]
    assert seen == [*ordinary, *ordinary, *update]


def test_the_checkpoint_is_a_plain_one(tmp_path):
    rigl, module = RigLCallback(0.8), small()
    keep = ModelCheckpoint(tmp_path, filename="last")
    keys = set(module.state_dict())
    fit = trainer(rigl, keep, enable_checkpointing=True)
    fit.fit(module, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)  # plain types only
    assert set(saved["state_dict"]) == set(module.state_dict()) == keys
    state = saved["callbacks"]["RigLCallback"]
    assert sum(entry["bits"].numel() for entry in state["masks"].values()) == (16 * 24 + 24 * 4) // 8
    loaded = Small.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), module(x))
    assert not [name for name, _ in module.named_buffers()]


class TestOtherStages:
    """Validate and test may load a checkpoint: its weights, and the masks that go with them."""

    SCHEDULE = UpdateSchedule(every=3, end=0.75, drop_fraction=0.5)

    def fitted(self, tmp_path, **settings):
        """After a fit of 24 steps, with a checkpoint of step 8."""
        rigl, module = RigLCallback(0.8, schedule=self.SCHEDULE, **settings), small()
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)
        fit = trainer(rigl, keep, max_epochs=3, enable_checkpointing=True)
        fit.fit(module, data(), data())
        return rigl, module, fit, tmp_path / "step=8.ckpt"

    def test_the_masks_are_those_of_the_weights(self, tmp_path):
        rigl, module, fit, early = self.fitted(tmp_path)
        final = {name: mask.clone() for name, mask in rigl.masks.items()}
        fit.validate(module, data(), ckpt_path=early, verbose=False)
        assert any(not torch.equal(final[name], mask) for name, mask in rigl.masks.items())
        for name, mask in rigl.masks.items():
            assert (module.get_parameter(name)[~mask] == 0).all()
        assert rigl.summary().total[2] == f"{sum(int(m.sum()) for m in final.values())} of 480"
        fit.save_checkpoint(tmp_path / "again.ckpt")
        saved = torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["RigLCallback"]["masks"]
        early_masks = torch.load(early, weights_only=True)["callbacks"]["RigLCallback"]["masks"]
        assert all(torch.equal(saved[k]["bits"], early_masks[k]["bits"]) for k in saved)

    def test_a_fit_on_from_there_keeps_the_masks_and_resolves_anew(self, tmp_path):
        rigl, module, _, early = self.fitted(tmp_path)
        again = trainer(rigl, max_epochs=6)
        again.validate(module, data(), ckpt_path=early, verbose=False)
        masks = {name: mask.clone() for name, mask in rigl.masks.items()}
        again.fit_loop.max_epochs = 6
        starts = []

        class Look(pl.Callback):
            def on_train_start(self, trainer, module):
                starts.append(all(torch.equal(masks[k], m) for k, m in rigl.masks.items()))

        again.callbacks.append(Look())
        again.fit(module, data())
        assert starts == [True]
        assert rigl.sparsifier.timetable.end == 36

    def test_a_new_model_starts_anew_after_a_validation(self, tmp_path):
        rigl, _, fit, early = self.fitted(tmp_path)
        first = {name: mask.clone() for name, mask in rigl.masks.items()}
        fit.validate(small(), data(), ckpt_path=early, verbose=False)
        trainer(rigl, max_epochs=3).fit(small(seed=2), data())
        assert rigl.sparsifier.seed == 2
        assert rigl.sparsifier.updates == 5  # 3 .. 15
        assert any(not torch.equal(first[k], m) for k, m in rigl.masks.items())

    def test_a_foreign_checkpoint_does_not_decide_a_later_fit(self, tmp_path):
        early = self.fitted(tmp_path, seed=1)[3]
        rigl = RigLCallback(0.8, schedule=self.SCHEDULE, seed=2)
        trainer(rigl).validate(small(), data(), ckpt_path=early, verbose=False)
        assert rigl.masks
        trainer(rigl).fit(small(), data())
        assert rigl.sparsifier.seed == 2


def test_pickle_and_deepcopy_leave_the_model_behind():
    rigl, module = RigLCallback(0.8), small()
    trainer(rigl).fit(module, data())
    for twin in (pickle.loads(pickle.dumps(rigl)), copy.deepcopy(rigl)):
        assert all(torch.equal(rigl.masks[k], twin.masks[k]) for k in rigl.masks)
        assert twin.sparsifier is None
        assert twin.state_dict()["updates"] == rigl.sparsifier.updates
    assert len(pickle.dumps(rigl)) < 4000  # 12.5 kB with the module
    clone = copy.deepcopy(module)
    assert equal(weights(module), weights(clone))


def test_validate_before_fit_changes_nothing():
    rigl, module = RigLCallback(0.8), small()
    before = weights(module)
    trainer(rigl).validate(module, data(), verbose=False)
    assert equal(before, weights(module))
    with pytest.raises(RuntimeError, match=r"trainer\.fit makes them"):
        _ = rigl.masks
    with pytest.raises(RuntimeError, match=r"trainer\.fit makes them"):
        rigl.summary()
    trainer(rigl).fit(module, data())
    assert rigl.masks


def test_a_run_too_short_is_said_once():
    with pytest.warns(UserWarning, match="no topology update will take place: the first is due at step 100"):
        trainer(RigLCallback(0.8)).fit(small(), data())
    with pytest.warns(UserWarning, match="training has 40 steps and ends before the updates do, at 50"):
        trainer(RigLCallback(0.8, schedule=UpdateSchedule(every=5, end=50))).fit(small(), data())
    for quiet in (RigLCallback(0.8, "static"), RigLCallback(0.8, schedule=SCHEDULE)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(quiet).fit(small(), data())
        assert not [w for w in said if "RigLCallback" in str(w.message)]


class Poison(pl.Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step in (6, 7):
            module.net[0].weight.grad.view(-1)[0] = float("inf")


def test_an_update_with_a_gradient_that_is_not_finite_is_postponed_and_said_once():
    rigl = RigLCallback(0.8, "set", schedule=SCHEDULE, seed=0)
    watch = Watch(rigl)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(rigl, watch, Poison()).fit(small(), data())
    assert len([w for w in said if "was not finite" in str(w.message)]) == 1
    assert watch.updates[0] == 8
    assert watch.updates[1] == 12  # the grid did not move


def test_an_optimizer_that_moves_inactive_weights_is_noticed_and_said_once():
    rigl = RigLCallback(0.8, schedule=SCHEDULE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(rigl, Watch(rigl)).fit(small(optimizer=lambda p: Noisy(p, 0.1)), data())
    assert len([w for w in said if "moves inactive weights" in str(w.message)]) == 1


class TestLogging:
    """Levels at the trainer's rhythm, events at once, settings as hyperparameters."""

    def test_no_log_call_on_ordinary_steps(self):
        class Count(Small):
            calls = 0

            def log(self, name, *args, **kwargs):
                Count.calls += name.startswith("sparsity/")
                super().log(name, *args, **kwargs)

        trainer(RigLCallback(0.8, "static"), log_every_n_steps=20).fit(Count(), data())
        assert Count.calls == 3 * (2 + 5)  # two flushes, five epochs


class TestRefusals:
    """Bad input, before anything is changed."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sparsity": 1.2}, r"\[0, 1\)"),
            ({"sparsity": {"net": 1.0}}, r"\[0, 1\)"),
            ({"sparsity": {"net": 0.5}, "distribution": ERK(power=0.5)}, "leave it out"),
            ({"method": "rigle"}, "rigl, .*static.*; did you mean 'rigl'"),
            ({"distribution": "erkk"}, "did you mean 'erk'"),
            ({"pattern": "nm"}, "unstructured"),
            ({"init": "pretrained"}, "'random', 'magnitude', 'nonzero'"),
        ],
    )
    def test_by_the_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RigLCallback(**arguments)

    def test_other_types_by_the_constructor(self):
        with pytest.raises(TypeError, match="UpdateSchedule"):
            RigLCallback(schedule={"every": 10})
        with pytest.raises(TypeError, match="init"):
            RigLCallback(init=3)
        with pytest.raises(TypeError, match="seed"):
            RigLCallback(seed="a")

    def test_model_pruning(self):
        with pytest.raises(MisconfigurationException, match="ModelPruning"):
            trainer(RigLCallback(), ModelPruning("l1_unstructured")).fit(small(), data())

    def test_lbfgs(self):
        module = small(optimizer=lambda p: torch.optim.LBFGS(p))
        before = weights(module)
        with pytest.raises(MisconfigurationException, match="LBFGS"):
            trainer(RigLCallback()).fit(module, data())
        assert equal(before, weights(module))

    @pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
    def test_strategies_that_hide_gradients(self, name):
        strategy = object.__new__(getattr(pl.strategies, name))
        fit = trainer()
        fit.strategy.__class__ = type(strategy)
        with pytest.raises(MisconfigurationException, match=f"does not run with {name}"):
            RigLCallback().setup(fit, small(), "fit")

    def test_xla(self):
        class SingleDeviceXLAStrategy(pl.strategies.SingleDeviceStrategy):
            """As Lightning's, which needs torch_xla; its name is what is looked at."""

        strategy = SingleDeviceXLAStrategy(torch.device("cpu"))
        with pytest.raises(MisconfigurationException, match=r"does not run with .*XLA.*ddp.*FSDP2"):
            trainer(RigLCallback(), strategy=strategy).fit(small(), data())

    def test_a_pattern_that_matches_nothing_leaves_the_weights(self):
        module = small()
        before = weights(module)
        with pytest.raises(ValueError, match="near misses"):
            trainer(RigLCallback(exclude=["head"])).fit(module, data())
        assert equal(before, weights(module))


def test_frozen_parameters_that_thaw_are_said():
    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.net[0].requires_grad_(trainer.current_epoch > 0)

    module = small()
    module.net[0].requires_grad_(False)
    rigl = RigLCallback(0.5, "static")
    with pytest.warns(UserWarning, match=r"net\.0\.weight were frozen"):
        trainer(rigl, Thaw()).fit(module, data())
    assert list(rigl.masks) == ["net.2.weight"]
