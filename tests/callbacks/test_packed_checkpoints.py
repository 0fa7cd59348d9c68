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
