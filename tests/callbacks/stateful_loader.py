"""Runs that can be resumed in the middle of an epoch, and what they are held to."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_rigl import RigLCallback, UpdateSchedule, load_masks
from tests.callbacks.problems import data, small, trainer

METHODS = ["rigl", "set", "static"]
SCHEDULE = UpdateSchedule(every=3, end=12, drop_fraction=0.5)  # 3, 6 (an epoch's last of seven steps), 9


def adamw(parameters):
    optimizer = torch.optim.AdamW(parameters, 0.01)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 30), "interval": "step"},
    }


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01)


def sparse(method="rigl", **settings):
    return RigLCallback(**{"sparsity": 0.8, "method": method, "schedule": SCHEDULE, "seed": 4, **settings})


def every_step(folder, **settings):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", **settings)


class StatefulLoader:
    """Seven batches whose position is saved: that of the last one handed out, or of the last one done.

    Args:
        replay: whether a batch that was handed out and not done with is handed out again after a resume.
    """

    def __init__(self, replay=False):
        self.batches = [tuple(batch) for batch in data(samples=56)]
        self.position, self.done = 0, 0 if replay else None

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in range(self.position % len(self), len(self)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position if self.done is None else self.done}

    def load_state_dict(self, state):
        self.position = state["position"]


class Done(pl.Callback):
    """Tells a loader that replays which batches are done."""

    def __init__(self, loader):
        self.loader = loader

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.loader.done is not None:
            self.loader.done = batch_idx + 1


def run(folder, *callbacks, module=None, loader=None, resume=None, keep=None, validation=None, **arguments):
    """A fit, with a checkpoint after each step if it is not a resumed one; returns what it ends with."""
    keep = keep or ([] if resume else [every_step(folder)])
    loop = trainer(*callbacks, *keep, **{"max_epochs": 2, "enable_checkpointing": bool(keep), **arguments})
    loop.fit(module or small(optimizer=adamw), loader or StatefulLoader(), validation, ckpt_path=resume)
    loop.save_checkpoint(folder / "end.ckpt")
    return read(folder / "end.ckpt")


def read(path):
    """Of a checkpoint everything that training changes: weights, masks, optimizer state, counters."""
    saved = torch.load(path, weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {**{key: saved[key] for key in kept}, "sparsity": saved["callbacks"].get("RigLCallback")}


def same(first, second):
    """Whether two such states are equal, bit by bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def counts(path):
    """Active connections of each layer in a checkpoint."""
    return {name: int(mask.sum()) for name, mask in load_masks(path).items()}


def assert_consistent(path, active):
    """The counts are right, weights and optimizer state zero where the masks say so, no update is ahead."""
    assert counts(path) == active
    saved, masks = read(path), load_masks(path)
    states = saved["optimizer_states"][0]["state"]
    for index, (name, weight) in enumerate(saved["state_dict"].items()):
        if name in masks:
            moments = [m for m in states.get(index, {}).values() if m is not None and m.shape == weight.shape]
            assert all((values[~masks[name]] == 0).all() for values in (weight, *moments))
            assert saved["sparsity"]["last"][name] <= saved["global_step"]
