"""DistributedDataParallel: every process has the same masks, and finds them without asking the others."""

import re
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing, nn
from torch.multiprocessing import ProcessRaisedException

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule, load_masks
from tests.callbacks.problems import data, small, trainer
from tests.distributed.problems import (
    SCHEDULE,
    Skipping,
    assert_same_everywhere,
    equal,
    finish,
    fit,
    sgd,
    sharded_sgd,
    shares,
    torchrun,
    weights,
)

PATIENCE = timedelta(seconds=20)


def results(folder, strategy="ddp_fork", **settings):
    """(weights, masks after each update) of two processes, and those of one with their joined batches."""
    fit(folder / "two.pt", strategy, **settings)
    fit(folder / "one.pt", "auto", processes=1, **settings)
    return torch.load(folder / "two.pt"), torch.load(folder / "one.pt")


def assert_agree(two, one, updates):
    (two, two_history), (one, history) = two, one
    assert len(two_history) == len(history) == updates
    for masks, others in zip(two_history, history, strict=True):
        assert masks.keys() == others.keys()
        assert all(torch.equal(masks[name], others[name]) for name in masks)
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


class TestTwoProcesses:
    """The same on both ranks after every update, and the same as one process with the joined batches."""

    @pytest.mark.parametrize("method", ["rigl", "set"])
    def test_fork(self, method, tmp_path):
        two, one = results(tmp_path, method=method)
        assert_agree(two, one, updates=4)

    @pytest.mark.slow
    def test_spawn(self, tmp_path):
        assert_agree(*results(tmp_path, "ddp_spawn"), updates=4)

    def test_torchrun(self, tmp_path):
        codes, said = finish(torchrun("fit", tmp_path / "two.pt", "ddp"))
        assert codes == [0], said
        fit(tmp_path / "one.pt", "auto", processes=1)
        assert_agree(torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt"), updates=4)

    @pytest.mark.parametrize("option", ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"])
    def test_options(self, option, tmp_path):
        strategy = DDPStrategy(start_method="fork", **{option: True})
        assert_agree(*results(tmp_path, strategy), updates=4)

    def test_an_optimizer_whose_state_is_spread_over_the_processes(self, tmp_path):
        assert_agree(*results(tmp_path, make=sharded_sgd), updates=4)

    def test_accumulated_batches(self, tmp_path):
        """Windows of three, three and two batches."""
        two, one = results(tmp_path, every=2, accumulate_grad_batches=3)
        assert_agree(two, one, updates=5)  # 2 .. 10 of 15

    def test_a_layer_that_one_process_or_no_process_uses(self, tmp_path):
        strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
        two, one = results(tmp_path, strategy, kind=Skipping)
        assert_agree(two, one, updates=4)
        at_6, at_12, at_18, at_24 = (masks["side.weight"] for masks in two[1])
        assert torch.equal(at_6, at_12)  # used by none at steps 12 and 24
        assert torch.equal(at_18, at_24)
        assert not torch.equal(at_12, at_18)

    def test_an_ordinary_step_sends_what_dense_training_sends(self, tmp_path):
        """As the process group counts, DDP's own reductions with it."""

        class Count(pl.Callback):
            def __init__(self, file):
                self.file, self.sent = file, []

            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                self.before = dist.group.WORLD._get_sequence_number_for_group()

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                self.sent.append(dist.group.WORLD._get_sequence_number_for_group() - self.before)

            def on_train_end(self, trainer, module):
                torch.save(self.sent, self.file)

        for file, callbacks in (("dense", []), ("sparse", [RigLCallback(0.8, schedule=SCHEDULE)])):
            settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
            run = trainer(*callbacks, Count(tmp_path / file), **settings)
            run.fit(small(dtype=torch.float64), shares(2))
        sent = zip(torch.load(tmp_path / "sparse"), torch.load(tmp_path / "dense"), strict=True)
        more = [sparse - dense for sparse, dense in sent]
        assert more == [2 * (step in (6, 12, 18, 24)) for step in range(40)]


class Flip(pl.Callback):
    """Rank 1 changes a mask."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            layer = self.rigl.sparsifier.layers["net.0.weight"]
            layer.replace(layer.mask.roll(1))


class Perturb(pl.Callback):
    """Rank 1 has a gradient of its own at an update."""

    def on_after_backward(self, trainer, module):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            module.net[0].weight.grad.normal_()


class OwnFile(pl.Callback):
    """Rank 1 starts from masks of its own, as where the nodes have different files of one name."""

    def setup(self, trainer, module, stage):
        masks = {"net.0.weight": torch.rand(24, 16) < 0.2}
        masks["net.0.weight"][:, trainer.global_rank] ^= True
        torch.save(masks, f"masks{trainer.global_rank}.pt")
        self.rigl.settings["init"] = f"masks{trainer.global_rank}.pt"


class Witnessed(RigLCallback):
    """Keeps what each process raises; all wait until all have raised."""

    def on_train_start(self, trainer, module):
        self.witness(super().on_train_start, trainer, module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.witness(super().on_before_optimizer_step, trainer, module, optimizer)

    def witness(self, hook, trainer, *arguments):
        try:
            hook(trainer, *arguments)
        except RuntimeError as error:
            keep_error(error, trainer.global_step)
            raise


def keep_error(error, step):
    torch.save((step, str(error)), f"error{dist.get_rank()}.pt")
    dist.barrier()


def errors():
    """(step, message) of each rank."""
    return [torch.load(f"error{rank}.pt") for rank in range(2)]


class TestDifferentMasks:
    """All processes stop, with a sentence that names the layer."""

    @pytest.mark.parametrize(("fault", "step"), [(Flip, 6), (Perturb, 6), (OwnFile, 0)])
    def test_are_refused(self, fault, step):
        rigl, fault = Witnessed(0.8, schedule=SCHEDULE, seed=1), fault()
        fault.rigl = rigl
        run = trainer(fault, rigl, devices=2, strategy=DDPStrategy(start_method="fork", timeout=PATIENCE))
        with pytest.raises(ProcessRaisedException, match=r"different masks in net\.0\.weight:"):
            run.fit(small(), data())
        assert [at for at, _ in errors()] == [step, step]
        assert all("different masks in net.0.weight: their seeds" in said for _, said in errors())

    @pytest.mark.parametrize("fault", ["seed", "seed, before the process group", "layers", "gradients"])
    def test_are_refused_in_a_plain_loop(self, fault):
        multiprocessing.start_processes(plain_loop, (fault,), nprocs=2, start_method="fork")
        expected = 4 if fault == "gradients" else 0
        assert [at for at, _ in errors()] == [expected, expected]
        layers = "2.weight" if fault == "layers" else "0.weight, 2.weight"
        assert all(f"different masks in {layers}: their seeds" in said for _, said in errors())


def plain_loop(rank, fault):
    """Without DistributedDataParallel nothing averages the gradients."""

    def join():
        dist.init_process_group("gloo", "file://" + store, timeout=PATIENCE, rank=rank, world_size=2)

    store = str(Path("store").absolute())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    late = fault == "seed, before the process group"
    if not late:
        join()
    sparsifier = Sparsifier(
        net,
        {"0": 0.8} if fault == "layers" and rank else {"0": 0.8, "2": 0.8},
        schedule=UpdateSchedule(every=4, end=8),
        seed=rank if "seed" in fault else 0,
    )
    if late:
        join()
    step = 0
    try:
        sparsifier.start()
        for step in range(8):
            optimizer.zero_grad()
            net(torch.randn(8, 16) + rank).square().sum().backward()
            sparsifier.before_step(optimizer, step)
            optimizer.step()
            sparsifier.after_step()
    except RuntimeError as error:
        keep_error(error, step)


class Poison(pl.Callback):
    """The gradient of an inactive connection is not finite, on rank 1 only."""

    def on_after_backward(self, trainer, module):
        if trainer.global_rank == 1 and trainer.global_step in (6, 7):
            module.net[0].weight.grad[~self.rigl.masks["net.0.weight"]] = float("inf")


class Updates(pl.Callback):
    def __init__(self, rigl):
        self.rigl, self.at = rigl, [-1]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        sparsifier = self.rigl.sparsifier
        if sparsifier.updates == len(self.at):
            self.at.append(trainer.global_step - 1)

    def on_train_end(self, trainer, module):
        assert_same_everywhere([*weights(module), *self.rigl.masks.values()])
        torch.save(self.at[1:], f"updates{trainer.global_rank}.pt")


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_gradient_not_finite_in_one_process_postpones_the_update_in_all(method):
    rigl, poison = RigLCallback(0.8, method, schedule=SCHEDULE), Poison()
    poison.rigl = rigl
    strategy = DDPStrategy(start_method="fork", timeout=PATIENCE)
    trainer(poison, rigl, Updates(rigl), devices=2, strategy=strategy).fit(small(), data(batch_size=4))
    assert torch.load("updates0.pt") == torch.load("updates1.pt") == [8, 12, 18, 24]


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
class TestTheParentProcess:
    """The weights come back to it; the masks are in the checkpoint, and the message says how to get them."""

    def test_masks(self, strategy, tmp_path):
        run, module, rigl = fit(
            tmp_path / "two.pt", strategy, enable_checkpointing=True, default_root_dir=tmp_path
        )
        for ask in (lambda: rigl.masks, rigl.summary):
            call = "load_masks(trainer.checkpoint_callback.best_model_path)"
            with pytest.raises(RuntimeError, match=re.escape(call)):
                ask()
        masks = eval(call, {"load_masks": load_masks, "trainer": run})
        trained, history = torch.load(tmp_path / "two.pt")
        assert equal(trained, weights(module))
        assert equal(history[-1].values(), masks.values())
        for name, mask in masks.items():
            assert torch.equal(module.get_parameter(name) != 0, mask)

    def test_a_second_fit(self, strategy, tmp_path):
        run, module, _ = fit(
            tmp_path / "two.pt", strategy, enable_checkpointing=True, default_root_dir=tmp_path
        )
        path = run.checkpoint_callback.best_model_path
        again = RigLCallback(0.8, "static", init=path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(again, max_epochs=1).fit(module, shares(1))
        assert not [w for w in said if "trained before" in str(w.message)]
        assert equal(load_masks(path).values(), again.masks.values())
        with pytest.warns(UserWarning, match=r"trained before \(net\.0\.weight has \d+ zeros\)"):
            trainer(RigLCallback(0.8, schedule=SCHEDULE)).fit(module, shares(1))

    def test_masks_of_an_earlier_fit(self, strategy, tmp_path):
        """They are not those of the weights that came back, and are neither shown, saved nor trained with."""
        module, rigl = small(optimizer=sgd, dtype=torch.float64), RigLCallback(0.8, schedule=SCHEDULE)
        run = trainer(rigl, max_epochs=2)
        run.fit(module, data(dtype=torch.float64))
        arguments = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
        trainer(rigl, max_epochs=5, **arguments).fit(module, data(dtype=torch.float64))
        trained = weights(module)
        for use in (
            lambda: rigl.masks,
            rigl.summary,
            lambda: run.save_checkpoint(tmp_path / "run.ckpt"),
            lambda: trainer(rigl, max_epochs=1).fit(module, data(dtype=torch.float64)),
        ):
            with pytest.raises(MisconfigurationException, match=r"init=<checkpoint>"):
                use()
        assert equal(trained, weights(module))
