"""`RigLCallback(pack_checkpoints=True)`: checkpoints in less space, resumed as plain ones."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_rigl import RigLCallback, UpdateSchedule, load_masks
from lightning_rigl.export.checkpoints import unpack_checkpoint
from lightning_rigl.export.packing import is_entry
from tests.export.test_packing import assert_same, assert_same_tree

SCHEDULE = UpdateSchedule(every=2, begin=1, end=3)


class Wide(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 2))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_lightning_resumes_a_packed_checkpoint_as_a_plain_one(packed, tmp_path):
    def trainer(steps):
        return pl.Trainer(
            max_steps=steps,
            limit_train_batches=4,
            limit_val_batches=0,
            callbacks=RigLCallback(0.9, seed=0, schedule=SCHEDULE, pack_checkpoints=packed),
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )

    torch.manual_seed(0)
    model = Wide()
    first = trainer(4)
    first.fit(model)
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    resumed = Wide()
    second = trainer(4)
    second.fit(resumed, ckpt_path=path)
    assert second.global_step == 4
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_same(one, other)
    states = [it.optimizers[0].state_dict() for it in (first, second)]
    assert_same_tree(states[0]["state"], states[1]["state"])
    if packed:
        assert is_entry(torch.load(path, weights_only=True)["state_dict"]["layer.0.weight"])
        with pytest.raises(RuntimeError, match=r"layer\.0\.weight"):  # the callback is not asked here
            Wide.load_from_checkpoint(path)
        dense = tmp_path / "dense.ckpt"
        torch.save(unpack_checkpoint(torch.load(path, weights_only=True)), dense)
        Wide.load_from_checkpoint(dense)
        assert load_masks(path).keys() == load_masks(dense).keys()


def test_the_checkpoint_callback_writes_them_and_removes_them(tmp_path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=1, monitor="step", mode="max")
    trainer = pl.Trainer(
        max_steps=6,
        limit_val_batches=0,
        callbacks=[RigLCallback(0.9, seed=0, schedule=SCHEDULE, pack_checkpoints=True), saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Wide())
    [path] = tmp_path.glob("*.ckpt")
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 6
    assert is_entry(content["state_dict"]["layer.0.weight"])


def one_step(tmp_path, steps=2, **settings):
    return pl.Trainer(
        max_steps=steps,
        limit_train_batches=4,
        limit_val_batches=1,
        limit_test_batches=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **settings,
    )


def test_reading_needs_no_option(tmp_path):
    model, path, again = Wide(), tmp_path / "packed.ckpt", tmp_path / "plain.ckpt"
    first = one_step(tmp_path, callbacks=RigLCallback(0.9, seed=0, schedule=SCHEDULE, pack_checkpoints=True))
    first.fit(model)
    first.save_checkpoint(path)
    assert is_entry(torch.load(path, weights_only=True)["state_dict"]["layer.0.weight"])
    for entry in ("validate", "test"):
        other = Wide()
        trainer = one_step(tmp_path, callbacks=RigLCallback(0.9))
        getattr(trainer, entry)(other, ckpt_path=path, verbose=False)
        assert_same_tree(other.state_dict(), model.state_dict())
    resumed, rigl = Wide(), RigLCallback(0.9, schedule=SCHEDULE)
    second = one_step(tmp_path, steps=4, callbacks=rigl)
    second.fit(resumed, ckpt_path=path)
    assert second.global_step == 4
    second.save_checkpoint(again)
    Wide.load_from_checkpoint(again)  # what is written is plain


@pytest.mark.parametrize("packed", [False, True])
def test_weights_come_back_from_started_processes(packed, tmp_path):
    torch.set_num_threads(1)
    model, before = Wide(), Wide().state_dict()
    rigl = RigLCallback(0.9, seed=0, schedule=SCHEDULE, pack_checkpoints=packed)
    one_step(tmp_path, callbacks=rigl, strategy="ddp_fork", devices=2).fit(model)
    assert model.layer[0].weight.count_nonzero() < 0.3 * before["layer.0.weight"].numel()
