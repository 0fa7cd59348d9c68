"""Several processes that train one model; `main` is what torchrun starts."""

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, Sampler

from lightning_rigl import RigLCallback, UpdateSchedule
from lightning_rigl.methods.gradual import Gradual, GradualGlobal
from lightning_rigl.model import sharding
from tests.callbacks.problems import Small, data, trainer

SCHEDULE = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01)


def sharded_sgd(parameters):
    """Each process keeps the momentum of a part of the parameters."""
    if dist.is_initialized():
        return ZeroRedundancyOptimizer(list(parameters), torch.optim.SGD, lr=0.1, momentum=0.9)
    return sgd(parameters)


class Skipping(Small):
    """A layer that no process uses on every fourth step, and only the first process on the others."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.side = nn.Linear(16, 4).to(self.net[0].weight.dtype)

    def forward(self, x):
        out = self.net(x)
        if self.trainer.global_step % 4 and self.global_rank == 0:  # its share is the first four of eight
            out = torch.cat([out[:4] + self.side(x[:4]), out[4:]])
        return out


class Shares(Sampler):
    """Of every eight samples, the first share to rank 0, the next one to rank 1."""

    def __init__(self, samples, share):
        self.samples, self.share = samples, share

    def __iter__(self):
        first = self.share * (dist.get_rank() if dist.is_initialized() else 0)
        return iter([8 * i + first + j for i in range(self.samples // 8) for j in range(self.share)])

    def __len__(self):
        return self.samples // 8 * self.share


class OwnSeeds(pl.Callback):
    def setup(self, trainer, module, stage):
        torch.manual_seed(7 + 100 * trainer.global_rank)


class Sent:
    """Stands in for torch.distributed, and notes what is sent through it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        value = getattr(dist, name)
        if name.startswith(("is_", "get_")) or not inspect.isfunction(value):
            return value

        def call(tensor, *arguments, **settings):
            self.calls.append((name, tensor.numel()))
            return value(tensor, *arguments, **settings)

        return call


class Together(pl.Callback):
    """After each update masks and weights are bitwise those of all ranks; other steps send nothing of ours.

    Goes behind the RigLCallback. The first rank saves the final weights and the masks after each update.
    """

    def __init__(self, rigl, file=None):
        self.rigl, self.file, self.history = rigl, file, []

    def on_train_start(self, trainer, module):
        self.compare(module)
        self.done = self.rigl.sparsifier.updates
        self.sent = Sent()
        self.patch = mock.patch.object(sharding, "dist", self.sent)
        self.patch.start()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.sent.calls.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        updated = self.rigl.sparsifier.updates > self.done
        finite, digest = ("all_reduce", 1), ("all_reduce", 2)
        pruned = isinstance(
            self.rigl.sparsifier.method, (Gradual, GradualGlobal)
        )  # no gradient is waited for
        expected = [digest] if pruned else [finite, digest]
        assert self.sent.calls == (expected if updated and trainer.world_size > 1 else [])
        if updated:
            self.compare(module)
            self.done += 1
            assert self.rigl.sparsifier.updates == self.done
            self.history.append({name: mask.clone() for name, mask in self.rigl.masks.items()})

    def on_train_end(self, trainer, module):
        self.patch.stop()
        self.compare(module)
        if trainer.global_rank == 0:
            torch.save((weights(module), self.history), self.file)

    def compare(self, module):
        for name, mask in self.rigl.masks.items():
            assert (module.get_parameter(name)[~mask] == 0).all()
        assert_same_everywhere([*weights(module), *self.rigl.masks.values()])


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_same_everywhere(tensors):
    if dist.is_initialized():
        mine = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        assert all(torch.equal(mine, other) for other in every)


def shares(processes, dtype=torch.float64):
    """Eight batches of eight, shared between the processes."""
    dataset = data(dtype=dtype).dataset
    share = 8 // processes
    return DataLoader(dataset, batch_size=share, sampler=Shares(len(dataset), share))


def fit(file, strategy, processes=2, method="rigl", kind=Small, make=sgd, every=6, **settings):
    """A fit in float64 that asserts what `Together` does; its results are in the file."""
    torch.manual_seed(0)
    module = kind(optimizer=make, dtype=torch.float64)
    schedule = UpdateSchedule(every=every, end=0.75, drop_fraction=0.5)
    rigl = RigLCallback(0.8, method, schedule=schedule)
    callbacks = OwnSeeds(), rigl, Together(rigl, file)
    arguments = {"devices": processes, "strategy": strategy, "log_every_n_steps": 3, **settings}
    run = trainer(*callbacks, use_distributed_sampler=False, **arguments)
    run.fit(module, shares(processes))
    return run, module, rigl


class Kill(pl.Callback):
    """The second process is gone after this many steps, as with kill -9."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def node(folder, kill_at, checkpoint):
    """One node of two, with a process each: four epochs of four steps, a checkpoint after each epoch."""
    torch.manual_seed(0)
    module = Small(optimizer=adamw)
    rigl = RigLCallback(0.8, schedule=UpdateSchedule(every=3, end=0.9, drop_fraction=0.5))
    together = Together(rigl, Path(folder) / "final.pt")
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(
        *(OwnSeeds(), rigl, together, Kill(int(kill_at)), keep),
        strategy="ddp",
        num_nodes=2,
        devices=1,
        max_epochs=4,
        enable_checkpointing=True,
    )
    loader = DataLoader(data().dataset, batch_size=8, shuffle=True)  # Lightning gives each node its half
    run.fit(module, loader, ckpt_path=checkpoint or None)
    assert run.world_size == 2
    assert run.node_rank == run.global_rank


def torchrun(task, *arguments, options=("--standalone", "--nproc-per-node=2")):
    """Start `main` in processes of its own."""
    inherited = {
        k: v for k, v in os.environ.items() if k.split("_")[-1] not in ("RANK", "SIZE", "PORT", "ADDR")
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=0", "--local-addr=127.0.0.1"]
    return subprocess.Popen(
        [*command, *options, "--module", "tests.distributed.problems", task, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*agents):
    """Exit code and output of each; one that hangs is ended, with its workers."""
    try:
        said = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    return [agent.returncode for agent in agents], said


def main():
    torch.set_num_threads(1)
    task, *arguments = sys.argv[1:]
    {"fit": fit, "node": node}[task](*arguments)
    os._exit(0)  # torch's threads may abort an orderly end of the interpreter


if __name__ == "__main__":
    main()
