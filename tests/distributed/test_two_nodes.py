"""Two nodes: one is lost in the middle, and the run goes on from its last checkpoint, exactly."""

import socket

import pytest
import torch

from lightning_rigl import load_masks
from tests.distributed.problems import equal, finish, torchrun


def run_nodes(folder, kill_at=0, checkpoint=""):
    """Exit code and output of both agents."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for rank in range(2):
        where = f"--local-addr=127.0.0.{rank + 1}", "--master-addr=127.0.0.1", f"--master-port={port}"
        nodes = "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"
        agents.append(torchrun("node", folder, kill_at, checkpoint, options=(*nodes, *where)))
    return finish(*agents)


@pytest.mark.slow
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint_and_nothing_else(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    codes, said = run_nodes(straight)
    assert codes == [0, 0], said
    codes, said = run_nodes(broken, kill_at=10)  # just after the update at step 9
    assert all(codes), said
    assert not (broken / "final.pt").exists()
    assert sorted(file.name for file in broken.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    codes, said = run_nodes(broken, checkpoint=broken / "epoch=1.ckpt")
    assert codes == [0, 0], said

    (weights, history), (others, rest) = torch.load(straight / "final.pt"), torch.load(broken / "final.pt")
    assert equal(weights, others)
    assert len(history) == 4  # 3, 6, 9, 12
    assert len(rest) == 2
    for masks, again in zip(history[2:], rest, strict=True):
        assert equal(masks.values(), again.values())
    assert not equal(history[1].values(), history[2].values())
    assert equal(load_masks(broken / "epoch=3.ckpt").values(), rest[-1].values())
