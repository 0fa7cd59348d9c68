"""A training with sharded parameters, started by torchrun: ``sharded_run.py FOLDER CASE [CHECKPOINT]``.

The first process stores the whole weights, the whole masks and what it saw under FOLDER.
"""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.model import sharding

SCHEDULE = UpdateSchedule(every=3, end=12, drop_fraction=0.5)
SIZES = {"fsdp": (2, 1), "tp": (1, 2), "both": (2, 2), "adamw": (2, 1), "set": (2, 1), "magnitude": (2, 1)}
GATHERED: list[int] = []  # elements of each tensor that a process gathered


class Sharded(pl.LightningModule):
    """An MLP whose layers are split over processes, unevenly too; each rank sees its part of the batch."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 23), nn.Tanh(), nn.Linear(23, 24), nn.Tanh(), nn.Linear(24, 4))
        self.net.double()

    def configure_model(self):
        mesh = self.device_mesh
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            for layer in (self.net[0], self.net[2], self.net[4]):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        mesh = self.device_mesh
        if mesh is not None and (parts := mesh["data_parallel"].size()) > 1:
            part = mesh["data_parallel"].get_local_rank()
            x, y = x.chunk(parts)[part], y.chunk(parts)[part]
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        if self.case == "adamw":
            return torch.optim.AdamW(self.parameters(), 0.01)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


class Watch(pl.Callback):
    """After each batch: the masks are sharded like the weights, the zeros hold, nothing is gathered."""

    def __init__(self, rigl):
        self.rigl, self.gathered = rigl, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        GATHERED.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.gathered.append(list(GATHERED))
        for layer in self.rigl.sparsifier.layers.values():
            assert (sharding.local(layer.parameter.detach())[layer.inactive()] == 0).all()
            if isinstance(layer.parameter, DTensor):
                assert layer.mask.placements == layer.parameter.placements
                assert layer.mask.to_local().shape == layer.parameter.to_local().shape


def settings(case):
    method = "set" if case == "set" else "rigl"
    init = "magnitude" if case == "magnitude" else "random"
    return {"sparsity": 0.8, "method": method, "schedule": SCHEDULE, "init": init, "seed": 5}


def batches():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)


def fit(case, folder, checkpoint=None, **arguments):
    """Three epochs of five steps, with a checkpoint after each."""
    module, rigl = Sharded(case), RigLCallback(**settings(case))
    watch, flops = Watch(rigl), FLOPsCallback()
    keep = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[rigl, watch, flops, keep],
        **arguments,
    )
    trainer.fit(module, batches(), ckpt_path=checkpoint)
    return {
        "weights": {name: sharding.full(p.detach()).clone() for name, p in module.named_parameters()},
        "masks": {name: sharding.full(mask) for name, mask in rigl.masks.items()},
        "gathered": watch.gathered,
        "updates": rigl.sparsifier.updates,
        "summary": str(rigl.summary()),
        "forward": flops.report().forward if trainer.global_rank == 0 else 0,
    }


def main(folder, case, checkpoint=None):
    whole = sharding.full

    def counting(tensor):
        if sharding.is_sharded(tensor):
            GATHERED.append(tensor.numel())
        return whole(tensor)

    sharding.full = counting
    data, tensor = SIZES[case]
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    result = fit(case, folder, checkpoint, devices=data * tensor, strategy=strategy)
    if dist.get_rank() == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    os._exit(0)  # torch's threads may abort an orderly end of the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
