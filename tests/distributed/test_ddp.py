"""DistributedDataParallel: every process has the same masks, and finds them without asking the others."""

import warnings
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing, nn
from torch.multiprocessing import ProcessRaisedException

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule, load_masks
from tests.callbacks.problems import Small, data, small, trainer
from tests.distributed.problems import SCHEDULE, Skipping, equal, fit, shares, torchrun, weights

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
        with torchrun("fit", tmp_path / "two.pt", "ddp") as agent:
            said, _ = agent.communicate(timeout=60)
        assert agent.returncode == 0, said
        fit(tmp_path / "one.pt", "auto", processes=1)
        assert_agree(torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt"), updates=4)

    @pytest.mark.parametrize("option", ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"])
    def test_options(self, option, tmp_path):
        strategy = DDPStrategy(start_method="fork", **{option: True})
        fit(tmp_path / "two.pt", strategy)
        fit(tmp_path / "one.pt", "auto", processes=1)
        assert_agree(torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt"), updates=4)
