"""One library a process, loaded on request; where it cannot be had, the reason in words and no error."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_rigl.kernels import build, library, product_calls
from lightning_rigl.kernels.library import Library, Loader

ignored = pytest.mark.filterwarnings("ignore:lightning_rigl compiles its kernels")


def test_the_library_says_what_it_was_made_for(kernels):
    assert kernels.isa in ("avx512", "avx2", "neon", "generic")
    assert kernels.panel == 32


def test_every_request_of_a_process_gets_the_same_library(kernels):
    assert library.load() is library.load()
    assert library.loaded() is library.load()
    assert library.why_not() == ""


def test_nothing_is_compiled_by_looking_whether_it_is_loaded(monkeypatch):
    monkeypatch.setattr(build, "library", lambda *asked: pytest.fail("compiled"))
    loader = Loader({})
    assert loader.loaded() is None
    assert loader.why_not() == "not asked for yet"


def test_threads_that_ask_at_once_share_one_library(kernels, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "library", lambda *_: (asked.append(1), time.sleep(0.05), kernels.path)[2])
    loader = Loader({})
    with ThreadPoolExecutor(4) as pool:
        found = {id(library) for library in pool.map(lambda _: loader.load(), range(8))}
    assert len(asked) == len(found) == 1


# --- reasons ---


def test_the_user_may_refuse_the_kernels():
    loader = Loader({"LIGHTNING_RIGL_NATIVE": "0"})
    assert loader.load() is None
    assert loader.why_not() == "LIGHTNING_RIGL_NATIVE=0 refuses the kernels; unset it to have them"


def test_a_missing_compiler_is_a_reason_and_no_error(tmp_path):
    loader = Loader({"CXX": "/nonexistent", "LIGHTNING_RIGL_CACHE": str(tmp_path)})
    assert loader.load() is None
    assert loader.loaded() is None
    assert loader.why_not().startswith("no C++ compiler: CXX=/nonexistent not found")


def test_an_unwritable_cache_is_a_reason_and_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    loader = Loader({**os.environ, "LIGHTNING_RIGL_CACHE": str(tmp_path / "file" / "cache")})
    assert loader.load() is None
    assert "Not a directory" in loader.why_not() or "no C++ compiler" in loader.why_not()


def test_a_file_that_is_no_library_is_a_reason_and_no_error(monkeypatch, tmp_path):
    (tmp_path / "kernels.so").write_text("words")
    monkeypatch.setattr(build, "library", lambda *asked: tmp_path / "kernels.so")
    loader = Loader({})
    assert loader.load() is None
    assert re.fullmatch(r".*kernels\.so: .*, though compiled anew; set another CXX", loader.why_not())


@pytest.fixture
def cached(kernels, tmp_path):
    """The path of a library in a cache of its own, made by a pretended compiler, and how to load it."""
    compiler = tmp_path / "pretended-c++"
    compiler.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then exit; fi\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {kernels.path} "$2"\n'
    )
    compiler.chmod(0o700)
    loader = Loader({
        "CXX": str(compiler), "LIGHTNING_RIGL_CACHE": str(tmp_path / "cache"), "PATH": os.environ["PATH"]
    })  # fmt: skip
    return build.library(loader._environment), loader


def become_garbage(path):
    """As its stamp says, but nothing that can be loaded."""
    path.unlink()
    path.write_bytes(b"garbage")
    stamp = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**stamp, "checksum": build._checksum(path)}))
    assert not build.refusal(path)


@ignored
def test_a_cached_library_that_the_system_refuses_is_compiled_anew(cached, kernels):
    path, loader = cached
    become_garbage(path)
    assert loader.load().path == path
    assert loader.why_not() == ""
    assert path.read_bytes() == kernels.path.read_bytes()


@ignored
def test_where_a_refused_library_cannot_be_replaced_both_reasons_are_told(cached, monkeypatch, tmp_path):
    path, _ = cached
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "sources"))
    prebuilt = build.SOURCES / "_kernels.so"
    for suffix in (".so", ".json"):
        shutil.copy(path.with_suffix(suffix), prebuilt.with_suffix(suffix))
    become_garbage(prebuilt)
    loader = Loader({"CXX": "/nonexistent", "LIGHTNING_RIGL_CACHE": str(tmp_path / "empty")})
    assert loader.load() is None
    assert re.match(r".*_kernels\.so: .*; no C\+\+ compiler: CXX=/nonexistent", loader.why_not())


def test_the_search_for_a_reason_is_not_repeated(monkeypatch):
    asked = []

    def refuse(*_):
        asked.append(1)
        raise build.BuildError("no")

    monkeypatch.setattr(build, "library", refuse)
    loader = Loader({})
    assert [loader.load(), loader.load()] == [None, None]
    assert len(asked) == 1


def test_a_library_of_another_interface_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(build, "ABI", build.ABI + 1)
    with pytest.raises(OSError, match=rf"made for interface {build.ABI - 1}, and this is {build.ABI}"):
        Library(kernels.path)


# --- with torch, in forked processes ---


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to read the loaded libraries from")
def test_the_kernels_use_the_openmp_that_torch_brought_along(kernels):
    """In a process of its own: other packages bring others."""
    code = (
        "from lightning_rigl.kernels import library; from pathlib import Path; assert library.load(); "
        "print(Path('/proc/self/maps').read_text())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mapped = set(re.findall(r"\S*lib(?:gomp|iomp|omp)\S*", run.stdout))
    assert len(mapped) <= 1, mapped


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_multiplies_on_one_thread_and_does_not_wait_for_threads_it_lacks(kernels):
    starts = torch.arange(0, 64 * 257, 64, dtype=torch.int32)
    columns = (torch.arange(256 * 64) % 64).to(torch.uint16)
    x, values = torch.randn(64, 64), torch.randn(256 * 64)
    torch.set_num_threads(2)
    try:
        before = product_calls.linear(kernels, x, starts, columns, values, None)  # OpenMP's threads exist now
        child = os.fork()
        if child == 0:  # and here they do not
            signal.alarm(20)
            after = product_calls.linear(kernels, x, starts, columns, values, None)
            os._exit(0 if after.numpy().tobytes() == before.numpy().tobytes() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(product_calls.linear(kernels, x, starts, columns, values, None), before)
    finally:
        torch.set_num_threads(1)


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index)) ** 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_data_loader_workers_serve_a_process_that_multiplies(kernels):
    starts, columns = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    loader = torch.utils.data.DataLoader(
        Squares(), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    seen = [product_calls.linear(kernels, x, starts, columns, torch.ones(2), None) for x in loader]
    assert torch.cat(seen).flatten().tolist() == [2.0 * i * i for i in range(8)]
