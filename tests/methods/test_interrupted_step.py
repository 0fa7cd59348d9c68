"""Inside a step CigL's weights are disturbed and a latent method's hold scores: nobody keeps or saves those.

on_train_batch_start      training_step, backward      on_before_optimizer_step      step
CigL:  W -> Z W  . . . . . . . . . . . . . . . . . . . Z W -> W
DNW, EdgePopup, GemMiner:                              weights -> variables . . . . . -> weights
"""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_rigl import CigL, RigLCallback, Sparsifier, UpdateSchedule
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import Done, StatefulLoader, adamw, read, run, same
from tests.model.problems import batches, network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path="),
    pytest.mark.filterwarnings("ignore:RigLCallback. (GemMiner prunes|no topology update|training has)"),
]
METHODS = {"cigl": CigL(0.5), "dnw": "dnw", "edgepopup": "edgepopup", "globaledgepopup": "globaledgepopup"}
METHODS["gemminer"] = "gemminer"
SCHEDULE = UpdateSchedule(every=3, begin=3, end=12, drop_fraction=0.5)
PLACES = ("on_before_backward", "on_before_optimizer_step")
INSIDE = {method: PLACES[method != "cigl"] for method in METHODS}  # where the weights are not themselves
STEP = 4


class InterruptionError(Exception):
    pass


def sparse(method, seed=4, schedule=SCHEDULE):
    return RigLCallback(0.6, METHODS[method], schedule=schedule, seed=seed)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Note(pl.Callback):
    """Goes before a RigLCallback: the weights between two steps."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == STEP:
            self.weights = weights(module)


class At(pl.Callback):
    """Does something at one place of one step."""

    def __init__(self, place, act):
        def hook(trainer, *_):
            if trainer.global_step == STEP:
                act(trainer)

        setattr(self, place, hook)


def fail(*_):
    raise InterruptionError


class Rescue(pl.Callback):
    """A callback of the user's own that saves, wherever it stands."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


def interrupted(method, place, *callbacks, rigl=None, module=None, loader=None):
    note, module = Note(), module or small(optimizer=adamw)
    loop = trainer(
        note, *callbacks, rigl or sparse(method), At(place, fail), max_epochs=2, enable_checkpointing=True
    )
    with pytest.raises(InterruptionError):
        loop.fit(module, loader or StatefulLoader())
    return note.weights, module, loop


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_after_an_exception_the_weights_are_those_before_the_step(method, place, tmp_path):
    rigl, saved = sparse(method), tmp_path / "on_exception.ckpt"
    callbacks = [OnExceptionCheckpoint(tmp_path), Rescue(tmp_path / "own.ckpt")]
    expected, module, loop = interrupted(method, place, *callbacks, rigl=rigl)
    assert same(weights(module), expected)
    for path in (saved, tmp_path / "own.ckpt"):
        assert same(dict(read(path)["state_dict"]), expected)
    for (
        name,
        mask,
    ) in rigl.masks.items():  # which refuses to be read if the weights are not those of the masks
        assert (expected[name][~mask] == 0).all()
    assert not any(p._backward_hooks for p in module.parameters())
    assert not loop.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("method", METHODS)
def test_weights_alone_are_saved_at_rest_too(method, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="x", save_on_exception=True, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only"):
        expected, *_ = interrupted(method, INSIDE[method], keep)
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    assert same(dict(saved["state_dict"]), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_the_rescued_run_ends_bitwise_as_the_straight_one(method, place, tmp_path):
    straight = run(tmp_path, sparse(method))
    loader = StatefulLoader(replay=True)
    interrupted(method, place, Done(loader), OnExceptionCheckpoint(tmp_path), loader=loader)
    loader = StatefulLoader(replay=True)
    path = tmp_path / "on_exception.ckpt"
    again = run(tmp_path / "again", Done(loader), sparse(method, seed=9), loader=loader, resume=path)
    assert same(straight, again)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_is_saved_inside_a_step_holds_the_weights_before_it(method, place, tmp_path):
    """And the step goes on as if nothing had been saved."""
    path, note, module = tmp_path / "inside.ckpt", Note(), small(optimizer=adamw)
    straight = run(tmp_path, sparse(method))
    save = At(place, lambda trainer: trainer.save_checkpoint(path))
    loop = trainer(note, sparse(method), save, max_epochs=2)
    loop.fit(module, StatefulLoader())
    assert same(dict(read(path)["state_dict"]), note.weights)
    assert same(weights(module), dict(straight["state_dict"]))


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_average_too(first, tmp_path):
    average, rigl, path = EMAWeightAveraging(decay=0.9), sparse("cigl"), tmp_path / "inside.ckpt"
    note, pair = Note(), [average, rigl] if first else [rigl, average]
    save = At("on_before_backward", lambda trainer: trainer.save_checkpoint(path))
    trainer(note, *pair, save, max_epochs=2).fit(small(optimizer=adamw), StatefulLoader())
    saved = torch.load(path, weights_only=True)
    assert same(dict(saved["current_model_state"]), note.weights)
    assert not same(dict(saved["state_dict"]), note.weights)


@pytest.mark.parametrize("method", METHODS)
def test_the_next_fit_of_the_module_begins_with_its_weights(method, tmp_path):
    """Of weights that are loaded after an exception nothing is overwritten by what was left of the step."""

    class Fails(pl.Callback):
        def on_exception(self, trainer, module, exception):
            raise RuntimeError("before the others are told")

    rigl, module = sparse(method, schedule=UpdateSchedule(every=100, end=200)), small()
    trainer(rigl, max_epochs=1).fit(module, data())
    state = weights(module)
    module.make = lambda parameters: torch.optim.SGD(parameters, 0.0)
    for callbacks, error in (([], InterruptionError), ([Fails()], RuntimeError)):
        loop = trainer(*callbacks, rigl, At(INSIDE[method], fail))
        with pytest.raises(error):
            loop.fit(module, data())
        if method == "cigl":  # else they follow from the scores
            state = {name: 3 * values for name, values in state.items()}
        module.load_state_dict(state)
        seen = Note()
        trainer(seen, rigl, max_steps=STEP + 1, max_epochs=-1).fit(module, data())
        assert same(seen.weights, state)
        assert same(weights(module), state)


def test_a_held_out_gradient_is_not_left_for_the_next_fit():
    rigl = RigLCallback(0.6, schedule=UpdateSchedule(every=STEP, policy="after_step", end=100), seed=1)
    interrupted("rigl", "on_before_optimizer_step", rigl=rigl)
    assert all(layer.kept is None for layer in rigl.sparsifier.layers.values())


@pytest.mark.parametrize("method", METHODS)
def test_in_a_plain_loop(method):
    model = network()
    sparsifier = Sparsifier(model, 0.7, METHODS[method], schedule=SCHEDULE, seed=5)
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), weights(model)
    sparsifier.start(20)
    for _ in range(2):
        sparsifier.before_forward(0)
        (model(batches(1)[0][0])).square().mean().backward()
        if method != "cigl":
            sparsifier.before_step(optimizer, 0)
        assert not same(weights(model), before)
        sparsifier.leave_step()
        assert same(weights(model), before)
    assert not optimizer._optimizer_step_post_hooks
