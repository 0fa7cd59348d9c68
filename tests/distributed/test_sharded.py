"""Parameters that are sharded over processes: FSDP2, tensor parallelism, and both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_rigl import load_masks
from tests.distributed import sharded_run

ROOT = Path(__file__).parent.parent.parent
LAYERS = {"net.0.weight": 16 * 23, "net.2.weight": 23 * 24, "net.4.weight": 24 * 4}


def launch(folder, case, *checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = str(torch.Size(sharded_run.SIZES[case]).numel())
    distributed = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "GROUP_RANK",
    )
    environment = {key: value for key, value in os.environ.items() if key not in distributed}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    script = [sharded_run.__file__, folder, case, *checkpoint]
    done = subprocess.run(
        [*torchrun, "--master-port", str(port), *map(str, script)],
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**torch.load(folder / "result.pt"), "said": done.stderr}


def assert_same_run(sharded, whole, exact=False):
    assert sharded["updates"] == whole["updates"] == 3
    assert sharded["masks"].keys() == whole["masks"].keys() == LAYERS.keys()
    for name, mask in whole["masks"].items():
        assert torch.equal(sharded["masks"][name], mask)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=0, atol=0 if exact else 1e-10)
    assert sharded["summary"] == whole["summary"]  # counts are those of the whole layers


@pytest.mark.parametrize(
    "case",
    ["fsdp", *(pytest.param(case, marks=pytest.mark.slow) for case in ("adamw", "set", "magnitude"))],
)
def test_the_masks_are_those_of_the_unsharded_run(case, tmp_path):
    sharded = launch(tmp_path, case)
    assert_same_run(sharded, sharded_run.fit(case, tmp_path / "whole", devices=1))
    assert "FLOPsCallback: no product with net.0.weight" in sharded["said"]


def test_one_layer_is_gathered_at_a_time_and_only_at_updates(tmp_path):
    """Tensor parallel, where one layer is not sharded at all; weight, mask and gradient of the others."""
    sharded = launch(tmp_path, "tp")
    assert_same_run(sharded, sharded_run.fit("tp", tmp_path / "whole", devices=1))
    split = [LAYERS["net.2.weight"], LAYERS["net.4.weight"]]
    assert sharded["forward"] == 2 * sum(int(mask.sum()) for mask in sharded["masks"].values())
    at_update = [size for size in split for _ in range(3)]
    for step, gathered in enumerate(sharded["gathered"]):
        assert gathered == (at_update if step in (3, 6, 9) else []), step


@pytest.mark.slow
def test_both_at_once_in_four_processes(tmp_path):
    assert_same_run(launch(tmp_path, "both"), sharded_run.fit("both", tmp_path / "whole", devices=1))


@pytest.mark.slow
def test_resuming_from_a_sharded_checkpoint_is_exact(tmp_path):
    straight = launch(tmp_path, "fsdp")
    checkpoint = tmp_path / "checkpoints" / "epoch=0.ckpt"  # after five steps of fifteen, one update of three
    assert checkpoint.is_dir()
    (tmp_path / "again").mkdir()
    resumed = launch(tmp_path / "again", "fsdp", checkpoint)
    assert len(resumed["gathered"]) == 10
    assert_same_run(resumed, straight, exact=True)
    last = load_masks(tmp_path / "checkpoints" / "epoch=2.ckpt")
    assert all(torch.equal(last[name], mask) for name, mask in straight["masks"].items())
