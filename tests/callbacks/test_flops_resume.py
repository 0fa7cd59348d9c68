"""The totals of FLOPsCallback continue: from a checkpoint, from fit to fit, through a copy or a pickle."""

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_rigl import FLOPsCallback
from tests.callbacks.flops_problems import F_D, Attends, Manual, fit, measurements, rigl
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import StatefulLoader

pytestmark = pytest.mark.filterwarnings(
    "ignore:RigLCallback. (training has|no topology update)",
    "ignore:.*callbacks used to create the checkpoint",
    "ignore:.*cannot be spent",
)


def run(folder, ckpt=None, epochs=2, **settings):
    class Save(pl.Callback):
        """In the middle of an accumulation window too."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    counter = FLOPsCallback()
    settings = {"accumulate_grad_batches": 2, "max_epochs": epochs, **settings}
    callbacks = rigl(every=2), counter, Save()
    fit(*callbacks, module=small(), loader=StatefulLoader(), ckpt=ckpt, **settings)
    return counter


@pytest.mark.parametrize("batch", [4, 5, 6, 7])
def test_a_run_resumed_at_any_batch_ends_with_the_same_totals_bitwise(batch, tmp_path, monkeypatch):
    """Windows are 0 1 | 2 3 | 4 5 | 6, then 7 8 and so on; 4 5, 7 8 and 11 12 end with an update."""
    straight = run(tmp_path)
    (tmp_path / "again").mkdir()
    made = measurements(monkeypatch)
    again = run(tmp_path / "again", ckpt=tmp_path / f"{batch}.ckpt")
    assert again.report() == straight.report()
    assert again.state_dict() == straight.state_dict()
    assert again.report().train_dense == 14 * 8 * 3 * F_D
    assert made == []  # the checkpoint has the table


def test_a_run_with_more_epochs_continues_them(tmp_path):
    run(tmp_path)
    again = run(tmp_path, ckpt=tmp_path / "13.ckpt", epochs=4)
    assert again.report() == run(tmp_path, epochs=4).report()


def test_they_continue_from_fit_to_fit_and_start_anew_with_another_model():
    counter, module = FLOPsCallback(), Small()
    for fits in (1, 2):
        fit(counter, module=module)
        assert counter.report().train == fits * 20 * 3 * F_D
    fit(counter, module=Small())
    assert counter.report().train == 20 * 3 * F_D


def test_they_start_anew_when_the_layers_of_a_module_change():
    counter, module = FLOPsCallback(), Small()
    fit(counter, module=module)
    module.net = nn.Linear(16, 4)
    with pytest.warns(UserWarning, match="start anew"):
        fit(counter, module=module)
    assert counter.report().train == 20 * 3 * 128


def test_a_validation_of_an_earlier_checkpoint_leaves_the_totals_alone(tmp_path):
    counter, module = FLOPsCallback(), Small()
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = fit(counter, keep, module=module, loader=data(), enable_checkpointing=True)
    early, fresh = tmp_path / "step=2.ckpt", FLOPsCallback()
    run.validate(module, data(8), ckpt_path=early, verbose=False)
    assert counter.report().train == 64 * 3 * F_D
    trainer(fresh).validate(module, data(8), ckpt_path=early, verbose=False)
    assert fresh.report().train == 16 * 3 * F_D  # what the checkpoint knows


def test_those_of_another_convention_are_refused():
    with pytest.raises(MisconfigurationException, match="continue with that one"):
        FLOPsCallback("official").load_state_dict(FLOPsCallback().state_dict())


def test_the_state_is_plain():
    counter = FLOPsCallback(budget=1e9)
    fit(counter, rigl(), module=Attends())
    assert json.loads(json.dumps(counter.state_dict())) == counter.state_dict()


def test_a_used_callback_can_be_copied_and_pickled_without_the_model():
    counter = FLOPsCallback(budget="0.5x")
    fit(counter, rigl(), module=Manual())
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert other.report() == counter.report()
        assert other.state_dict() == counter.state_dict()
    assert len(pickle.dumps(counter)) < 2500
