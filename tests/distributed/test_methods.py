"""Every method of the package in two processes, replicated and sharded: two are started, for all of them."""

import os
import traceback
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lightning_rigl import Growth, RigLCallback, Sparsifier
from lightning_rigl.model import sharding
from tests.callbacks.problems import Small, trainer
from tests.distributed import sharded_run
from tests.distributed.problems import OwnSeeds, adamw, assert_same_everywhere, equal, shares, weights
from tests.methods.test_contract import METHODS
from tests.methods.test_contract_with_a_trainer import schedule

STEPS = 16
WHOLE = {  # these look at a layer at every step, or before the first, or train a variable of their own
    *("CigL", "DeepR", "DNW", "EdgePopup", "GemMiner", "GlobalEdgePopup", "GraSP", "RigLSM", "SNFS"),
    *("SNFSOriginal", "SynFlow"),
}


class History(pl.Callback):
    """Masks after each batch; masks, weights and notes are bitwise those of all processes."""

    def __init__(self, rigl):
        self.rigl, self.masks = rigl, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        notes = [note for layer in self.rigl.sparsifier.layers.values() for note in layer.notes.values()]
        assert_same_everywhere([*weights(module), *self.rigl.masks.values(), *notes])
        self.masks.append({name: mask.clone() for name, mask in self.rigl.masks.items()})


def fit(name, processes):
    """Two epochs of eight batches, half of each for a process: the weights, and the masks after each step."""
    torch.manual_seed(0)
    module, kind = Small(optimizer=adamw, dtype=torch.float64), METHODS[name]
    rigl = RigLCallback(0.7, name, schedule=schedule(kind))
    history = History(rigl)
    settings = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    run = trainer(OwnSeeds(), rigl, history, max_epochs=2, use_distributed_sampler=False, **settings)
    run.fit(module, shares(processes))
    assert run.world_size == processes
    assert run.global_step == STEPS
    return weights(module), history.masks


def loop(name, sharded, growth=None):
    """The same in a plain loop; if the method is refused the message, and the model is untouched."""
    torch.manual_seed(0)
    model = Small(dtype=torch.float64).net
    if sharded:
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    before = whole(model)
    try:
        sparsifier = Sparsifier(model, 0.7, name, schedule=schedule(METHODS[name]), seed=1, growth=growth)
    except ValueError as error:
        assert equal(whole(model), before)
        return str(error)
    optimizer, history = adamw(model.parameters()), []
    sparsifier.start(STEPS)
    for step, (x, y) in enumerate([tuple(batch) for batch in shares(2 if sharded else 1)] * 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        history.append({key: sharding.full(mask).clone() for key, mask in sparsifier.masks.items()})
    return whole(model), history


def whole(model):
    """Copies of its parameters, gathered."""
    return [sharding.full(p.detach()).clone() for p in model.parameters()]


def sharded_fit(name):
    """In a Trainer with ModelParallelStrategy: the message if the method is refused."""
    module, rigl = (
        sharded_run.Sharded("adamw"),
        RigLCallback(0.8, name, schedule=schedule(METHODS[name]), seed=5),
    )
    strategy = ModelParallelStrategy(2, 1) if dist.is_initialized() else "auto"
    devices = 2 if dist.is_initialized() else 1
    run = trainer(rigl, max_epochs=2, devices=devices, strategy=strategy, use_distributed_sampler=False)
    try:
        run.fit(module, sharded_run.batches())
    except ValueError as error:
        return str(error)
    return whole(module), [{key: sharding.full(mask) for key, mask in rigl.masks.items()}]


def process(rank):
    """All runs of one process, as torchrun would start it."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in ranks.items()}, TORCHELASTIC_RUN_ID="test")
    patience = timedelta(seconds=20)
    dist.init_process_group("gloo", f"file://{os.getcwd()}/store", patience, world_size=2, rank=rank)
    for name in METHODS:
        save(f"replicated-{name}", rank, lambda name=name: fit(name, 2))
        save(f"sharded-{name}", rank, lambda name=name: loop(name, True))
    for name in ("SNFS", "DSR", "GradualGlobal"):
        save(f"trainer-{name}", rank, lambda name=name: sharded_fit(name))
    save("growth", rank, lambda: loop("RigL", True, Growth("normal")))
    os._exit(0)  # torch's threads may abort an orderly end of the interpreter


def save(file, rank, run):
    try:
        torch.save(run(), f"{file}-{rank}.pt")
    except BaseException:
        torch.save(traceback.format_exc(), f"error-{rank}.pt")
        raise


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A file's name -> what both processes found; what they said, if they did not get there."""
    folder, here = tmp_path_factory.mktemp("processes"), os.getcwd()
    os.chdir(folder)
    try:
        multiprocessing.start_processes(process, nprocs=2, start_method="fork")
    except (ProcessRaisedException, ProcessExitedException):
        pass  # each test tells
    finally:
        os.chdir(here)

    def found(file):
        errors = [torch.load(path) for path in sorted(folder.glob("error-*.pt"))]
        paths = [folder / f"{file}-{rank}.pt" for rank in range(2)]
        assert all(path.exists() for path in paths), "\n".join(errors)
        return [torch.load(path) for path in paths]

    return found


def assert_equal_runs(first, second, tolerance):
    for masks, others in zip(first[1], second[1], strict=True):
        assert masks.keys() == others.keys()
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_same_masks_and_weights_as_one(name, results):
    """Those of each other after each step, bitwise; those of one process with the joined batches."""
    first, second = results(f"replicated-{name}")
    assert_equal_runs(first, second, 0)
    if name != "GraSP":  # whose scores of two halves of a batch, averaged, are not those of the whole
        assert_equal_runs(first, fit(name, 1), 1e-10)
    moved = any(not torch.equal(mask, first[1][0][key]) for key, mask in first[1][-1].items())
    once = name in ("GraSP", "SNIP", "SNIPGlobal", "Static", "SynFlow")
    assert moved != once


@pytest.mark.parametrize("name", METHODS)
def test_sharded_parameters_give_the_masks_of_whole_ones_or_are_refused(name, results):
    first, second = results(f"sharded-{name}")
    if name in WHOLE:
        assert first == second == refusal(name, "0.weight", Growth())
    else:
        assert_equal_runs(first, second, 0)
        assert_equal_runs(first, loop(name, sharded=False), 1e-10)


def refusal(name, layer, growth):
    return (
        f"{layer} is sharded over processes, and {name} with growth={growth} needs it whole: train with "
        "DDP, or with a method of two scores and growth=None"
    )


@pytest.mark.parametrize("name", ["DSR", "GradualGlobal"])
def test_sharded_parameters_in_a_trainer(name, results):
    first, second = results(f"trainer-{name}")
    assert_equal_runs(first, second, 0)
    assert_equal_runs(first, sharded_fit(name), 1e-10)


def test_refusals_in_a_trainer_and_of_growth(results):
    assert results("trainer-SNFS") == [refusal("SNFS", "net.0.weight", Growth())] * 2
    assert results("growth") == [refusal("RigL", "0.weight", Growth("normal"))] * 2
