"""Every test starts from one seed, on one thread (the networks are tiny), and leaves no folder behind."""

import os

import pytest
import torch

from lightning_rigl.kernels import library

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic rows on CUDA
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed_and_folder(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setattr(library._PROCESS, "_library", None)  # each test loads the kernels itself, or has none
    monkeypatch.setattr(library._PROCESS, "_why_not", "not asked for yet")
    monkeypatch.chdir(tmp_path)
