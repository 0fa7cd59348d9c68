"""A run that is interrupted, by an exception or by SIGKILL, leaves checkpoints that it goes on from."""

import multiprocessing
import os
import random
import signal
import tempfile
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_rigl import UpdateSchedule
from tests.callbacks.problems import Small, small, trainer
from tests.callbacks.stateful_loader import (
    METHODS,
    Done,
    StatefulLoader,
    adamw,
    assert_consistent,
    counts,
    read,
    run,
    same,
    sparse,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path="),
]


class InterruptionError(Exception):
    pass


class Interrupt(pl.Callback):
    """Ends a training at one step, at some place in it."""

    def __init__(self, place, step):
        self.place, self.step = place, step

    def fail(self, *_):
        raise InterruptionError

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        if self.place == "training step":
            module.training_step = self.fail
        elif self.place == "after the optimizer step":
            trainer.optimizers[0].register_step_post_hook(self.fail)
        elif self.place == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if (self.place, self.step) == ("optimizer step", trainer.global_step):
            self.fail()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (self.place, self.step) == ("batch end", trainer.global_step - 1):
            self.fail()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    ends = {}
    for method in (None, *METHODS):
        folder = tmp_path_factory.mktemp(str(method))
        run(folder, *([sparse(method)] if method else []))
        ends[method] = folder / "end.ckpt"
    return ends


class Manual(Small):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class TestOnExceptionCheckpoint:
    """What a dense run survives exactly, a sparse one does; no interruption makes it inconsistent."""

    DENSE_IS_EXACT = (
        ("training step", True),
        ("optimizer step", True),
        ("batch end", True),
        ("batch end", False),
        ("sigterm", True),
        ("sigterm", False),
    )
    PLACES = (
        *DENSE_IS_EXACT,
        ("after the optimizer step", True),
        pytest.param("after the optimizer step", False, marks=pytest.mark.slow),
        pytest.param("training step", False, marks=pytest.mark.slow),
        pytest.param("optimizer step", False, marks=pytest.mark.slow),
    )

    def interrupt(self, folder, place, step, replay, *sparsity, module=None):
        loader = StatefulLoader(replay)
        rescue = [Interrupt(place, step), OnExceptionCheckpoint(folder)]
        loop = trainer(Done(loader), *sparsity, *rescue, max_epochs=2, enable_checkpointing=True)
        with pytest.raises((InterruptionError, SystemExit)):
            loop.fit(module or small(optimizer=adamw), loader)
        return folder / "on_exception.ckpt"

    def resume(self, rescued, replay, *sparsity, module=None):
        loader = StatefulLoader(replay)
        return run(rescued.parent, Done(loader), *sparsity, loader=loader, resume=rescued, module=module)

    @pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4, 6))])
    @pytest.mark.parametrize(("place", "replay"), PLACES)
    def test_sparse_is_exact_wherever_dense_is(self, place, replay, step, undisturbed, tmp_path):
        """At an update (3), just after one (4), at one on the last batch of an epoch (6)."""
        exact = {}
        for method, end in undisturbed.items():
            straight, new = read(end), lambda method=method: [sparse(method)] if method else []
            rescued = self.interrupt(tmp_path / str(method), place, step, replay, *new())
            resumed = self.resume(rescued, replay, *new())
            exact[method] = same(straight, resumed)
            if method:
                assert_consistent(rescued, counts(end))
                assert_consistent(rescued.parent / "end.ckpt", counts(end))
                assert resumed["sparsity"]["updates"] == straight["sparsity"]["updates"]
        assert exact[None] or (place, replay) not in self.DENSE_IS_EXACT
        assert all(exact.values()) or not exact[None], exact

    @pytest.mark.parametrize("method", METHODS)
    def test_an_update_at_the_very_first_step(self, method, tmp_path):
        first = {"schedule": UpdateSchedule(every=3, end=12, begin=0, drop_fraction=0.5)}
        straight = run(tmp_path, sparse(method, **first))
        rescued = self.interrupt(tmp_path, "optimizer step", 0, True, sparse(method, **first))
        assert same(straight, self.resume(rescued, True, sparse(method, **first)))

    @pytest.mark.parametrize("end", [None, 12, 0.9])
    @pytest.mark.parametrize("place", ["training step", "optimizer step", "batch end"])
    def test_in_manual_optimization(self, place, end, tmp_path):
        """Dense, with an end in steps, and with one in the trainer's progress."""

        def new():
            schedule = UpdateSchedule(every=2, end=end, drop_fraction=0.5) if end else None
            return [sparse("rigl", schedule=schedule)] if end else []

        straight = run(tmp_path, *new(), module=Manual())
        rescued = self.interrupt(tmp_path / "again", place, 3, True, *new(), module=Manual())
        assert same(straight, self.resume(rescued, True, *new(), module=Manual()))

    @pytest.mark.parametrize("kind", [Manual, lambda: small(optimizer=adamw)], ids=["manual", "automatic"])
    def test_in_the_same_session(self, kind, tmp_path):
        """The module and the callback that were interrupted go on in a new trainer."""
        straight = run(tmp_path, sparse(), module=kind())
        rigl, module = sparse(), kind()
        rescued = self.interrupt(tmp_path / "again", "optimizer step", 3, True, rigl, module=module)
        assert same(straight, self.resume(rescued, True, rigl, module=module))


class Watched(TorchCheckpointIO):
    """Tells another process how many steps are saved, and whether it is saving now."""

    def __init__(self, marks):
        self.marks = marks

    def save_checkpoint(self, checkpoint, *arguments, **settings):
        self.marks[:] = [checkpoint["global_step"], True]
        super().save_checkpoint(checkpoint, *arguments, **settings)
        self.marks[1] = False


class Pause(pl.Callback):
    """Steps that take as long as saving does, or nearly every moment would be one of saving."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(0.004)


def train(folder, method, marks, resume=None):
    """A run of 14 steps, in a process of its own, with a checkpoint after each."""
    tempfile.tempdir = str(folder)  # Lightning writes there, then moves the file
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_last=True)
    run(folder, sparse(method), Pause(), keep=[keep], resume=resume, plugins=[Watched(marks)])


def forked(folder, method, resume=None):
    """Start such a run; what is imported and built is inherited, so that it starts at once."""
    marks = multiprocessing.RawArray("i", 2)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=train, args=(folder, method, marks, resume))
    child.start()
    return child, marks


def kill(folder, method, saving, dice):
    """Start a run and kill it at a random moment; returns whether that was in the middle, saving or not."""
    folder.mkdir()
    child, marks = forked(folder, method)
    step = dice.randrange(2, 13)
    while child.is_alive() and (marks[0] < step or marks[1] != saving):
        time.sleep(1e-4)
    time.sleep(dice.uniform(0, 0.002))
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL and 0 < marks[0] < 14 and marks[1] == saving


SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))]


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_9_at_any_moment(seed, undisturbed, tmp_path):
    """While a checkpoint is being saved (odd seeds), or between two: no file is broken, no bit is lost."""
    method, dice = METHODS[seed % 3], random.Random(seed)
    attempts = (tmp_path / str(attempt) for attempt in range(20))
    folder = next(attempt for attempt in attempts if kill(attempt, method, seed % 2, dice))
    for path in tmp_path.glob("*/*.ckpt"):
        assert_consistent(path, counts(undisturbed[method]))
    newest = max(folder.glob("*.ckpt"), key=lambda path: read(path)["global_step"])
    child, _ = forked(folder, method, newest)
    child.join()
    assert child.exitcode == 0
    assert same(read(undisturbed[method]), read(folder / "end.ckpt"))
