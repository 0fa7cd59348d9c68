"""The kernels are compiled once, by one process, into a place that can be trusted; else the reason is told.

A shell script stands in for the compiler: it notes each call and hands out the library that the real compiler
made, so that no row here waits for a compilation.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from lightning_rigl.kernels import build, library

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the kernels are made on Linux and macOS only"),
    pytest.mark.filterwarnings("ignore:lightning_rigl compiles its kernels"),
]


class Compiler:
    """A pretended compiler in a folder of its own, and the environment that names it and an empty cache."""

    def __init__(self, folder, library, before="", after=""):
        self.calls = folder / "calls"
        self.calls.touch()
        self.command = folder / "pretended-c++"
        self.command.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = --version ]; then echo pretended 1.0; exit 0; fi\n'
            f'echo "$@" >> {self.calls}\n{before}\n'
            'while [ "$1" != -o ]; do shift; done\n'
            f'cp {library} "$2"\n{after}\n'
        )
        self.command.chmod(0o700)
        self.cache = folder / "cache"
        self.environment = {
            "CXX": str(self.command), "LIGHTNING_RIGL_CACHE": str(self.cache), "PATH": os.environ["PATH"]
        }  # fmt: skip

    def number_of_calls(self):
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def pretended(kernels, tmp_path):
    return lambda **lines: Compiler(tmp_path, kernels.path, **lines)


@pytest.fixture
def compiler(pretended):
    return pretended()


def interface_of(path):
    return ctypes.CDLL(str(path)).lr_abi()


# --- once ---


def test_the_first_request_compiles_and_the_second_finds_it(compiler):
    first = build.library(compiler.environment)
    assert first.parent == compiler.cache
    assert interface_of(first) == build.ABI
    assert build.library(compiler.environment) == first
    assert compiler.number_of_calls() == 1


def test_a_compilation_is_announced_with_its_place_and_a_library_that_is_there_is_not(compiler):
    words = rf"compiles its kernels into {re.escape(str(compiler.cache))}; this takes some seconds, once"
    with pytest.warns(UserWarning, match=words):
        build.library(compiler.environment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.library(compiler.environment)


def test_a_warning_that_is_an_error_leaves_no_library_and_says_so(compiler):
    loader = library.Loader(compiler.environment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.load() is None
    assert "compiles its kernels into" in loader.why_not()


def test_without_a_compiler_a_library_of_the_cache_is_taken(compiler):
    made = build.library(compiler.environment)
    without = {**compiler.environment, "CXX": "no-such-compiler"}
    assert build.library(without) == made
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.library(without, {made})
    made.write_bytes(made.read_bytes() + b"damage")
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.library(without)


def test_nothing_is_announced_where_nothing_can_be_written(compiler, tmp_path):
    (tmp_path / "file").write_text("in the way")
    environment = {**compiler.environment, "LIGHTNING_RIGL_CACHE": str(tmp_path / "file" / "cache")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(build.BuildError, match="Not a directory"):
            build.library(environment)


def test_the_announcement_comes_before_the_compiler_is_called(compiler, monkeypatch):
    calls = []
    monkeypatch.setattr(build.warnings, "warn", lambda *words, **_: calls.append(compiler.number_of_calls()))
    build.library(compiler.environment)
    assert calls == [0]


def test_nothing_but_the_library_its_stamp_and_its_lock_stays_behind(compiler):
    path = build.library(compiler.environment)
    assert {p.name for p in compiler.cache.iterdir()} == {path.name, f"{path.stem}.json", f"{path.name}.lock"}


def test_all_cpp_files_of_the_folder_are_compiled_into_one_library(compiler):
    build.library(compiler.environment)
    given = [Path(word).name for word in compiler.calls.read_text().split() if word.endswith(".cpp")]
    assert given == sorted(path.name for path in build.SOURCES.glob("*.cpp"))


def test_several_processes_that_ask_at_once_compile_once_and_all_get_a_whole_library(pretended):
    compiler = pretended(before="sleep 0.5")
    children = [
        _child(lambda: interface_of(build.library(compiler.environment)) == build.ABI) for _ in range(6)
    ]
    assert [_outcome(child) for child in children] == [0] * 6
    assert compiler.number_of_calls() == 1


def test_a_process_killed_while_it_compiles_holds_up_no_one(pretended, tmp_path):
    compiler = pretended(
        before=f"if [ ! -e {tmp_path}/begun ]; then touch {tmp_path}/begun; exec sleep 5; fi"
    )
    child = _child(lambda: bool(build.library(compiler.environment)))
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert _outcome(child) == -signal.SIGKILL
    began = time.monotonic()
    assert interface_of(build.library(compiler.environment)) == build.ABI
    assert time.monotonic() - began < 4


def test_another_compiler_another_cpu_and_other_sources_each_get_a_library_of_their_own(
    compiler, monkeypatch, tmp_path
):
    paths = [build.library(compiler.environment)]
    compiler.command.write_text(compiler.command.read_text().replace("pretended 1.0", "pretended 2.0"))
    paths.append(build.library(compiler.environment))
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"another"}))
    paths.append(build.library(compiler.environment))
    _copy_of_sources(monkeypatch, tmp_path)
    (build.SOURCES / "vectors.h").write_text("// changed")
    paths.append(build.library(compiler.environment))
    assert len(set(paths)) == 4


# --- damage ---


@pytest.mark.parametrize("damage", ["a byte", "the end", "everything", "the stamp", "half a stamp"])
def test_a_damaged_library_is_never_loaded_but_made_anew(compiler, damage):
    path = build.library(compiler.environment)
    stamp, whole = path.with_suffix(".json"), path.read_bytes()
    path.unlink()  # this process may have it mapped
    middle = len(whole) // 2
    path.write_bytes({
        "a byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "the end": whole[:-100],
        "everything": b"",
    }.get(damage, whole))  # fmt: skip
    if damage == "the stamp":
        stamp.unlink()
    if damage == "half a stamp":
        stamp.write_text(stamp.read_text()[:20])
    assert build.refusal(path)
    assert build.library(compiler.environment) == path
    assert not build.refusal(path)
    assert path.read_bytes() == whole
    assert compiler.number_of_calls() == 2


def test_the_words_for_a_damaged_library_say_so(compiler):
    path = build.library(compiler.environment)
    path.unlink()
    path.write_bytes(b"no library")
    assert build.refusal(path) == f"{path}: its checksum is not that of its stamp; the file is damaged"


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("machine", "sparc", f"made for sparc, and this machine is {platform.machine()}"),
        ("needs", ["teleport", "avx9000"], "asks for avx9000, teleport, which this CPU does not have"),
        ("abi", 0, "made of other sources than the package's"),
        ("sources", "0" * 64, "made of other sources than the package's"),
    ],
)
def test_a_library_for_another_machine_or_of_other_sources_is_refused(compiler, fact, value, words):
    path = build.library(compiler.environment)
    stamp = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**stamp, fact: value}))
    assert build.refusal(path) == f"{path}: {words}"


# --- prebuilt ---


def test_a_library_beside_the_sources_needs_no_compiler_and_no_cache(compiler, monkeypatch, tmp_path):
    _copy_of_sources(monkeypatch, tmp_path)
    prebuilt = build.SOURCES / "_kernels-v3.so"
    build.compile_into(prebuilt, [str(compiler.command)], target=("-march=x86-64-v3",))
    assert {"avx2", "fma"} <= set(json.loads(prebuilt.with_suffix(".json").read_text())["needs"])
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build._needs(["-march=x86-64-v3"])))
    nothing = {"CXX": "/nonexistent", "LIGHTNING_RIGL_CACHE": "/nonexistent/cache"}
    assert build.library(nothing) == prebuilt
    better = build.SOURCES / "_kernels-v4.so"
    build.compile_into(better, [str(compiler.command)], target=("-march=x86-64-v4",))
    assert build.library(nothing) == prebuilt  # this CPU has no avx512f
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build._needs(["-march=x86-64-v4"])))
    assert build.library(nothing) == better


def test_a_damaged_library_beside_the_sources_is_passed_over(compiler, monkeypatch, tmp_path):
    _copy_of_sources(monkeypatch, tmp_path)
    prebuilt = build.SOURCES / "_kernels.so"
    build.compile_into(prebuilt, [str(compiler.command)], target=())
    prebuilt.write_bytes(prebuilt.read_bytes()[:-1])
    assert build.library(compiler.environment).parent == compiler.cache


def test_a_library_that_the_system_refused_is_passed_over_beside_the_sources_and_made_anew_in_the_cache(
    compiler, monkeypatch, tmp_path
):
    _copy_of_sources(monkeypatch, tmp_path)
    prebuilt = build.SOURCES / "_kernels.so"
    build.compile_into(prebuilt, [str(compiler.command)], target=())
    assert build.library(compiler.environment) == prebuilt
    cached = build.library(compiler.environment, [prebuilt])
    assert cached.parent == compiler.cache
    assert build.library(compiler.environment, [prebuilt]) == cached
    assert compiler.number_of_calls() == 2
    assert build.library(compiler.environment, [prebuilt, cached]) == cached
    assert compiler.number_of_calls() == 3


# --- no compiler, a compiler that fails, nowhere to write ---


def test_a_compiler_that_is_not_there_is_told(compiler):
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: CXX=/nonexistent not found; install one"):
        build.library({**compiler.environment, "CXX": "/nonexistent"})
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: g\+\+, c\+\+ and clang\+\+ not found"):
        build.library({"PATH": "/nonexistent", "LIGHTNING_RIGL_CACHE": str(compiler.cache)})


def test_a_cxx_that_no_shell_would_read_is_told(compiler):
    with pytest.raises(
        build.BuildError, match=r"^CXX=g\+\+ ' is not a command: No closing quotation; set ano"
    ):
        build.library({**compiler.environment, "CXX": "g++ '"})


def test_a_compiler_that_the_system_does_not_run_is_told(compiler):
    compiler.command.write_bytes(b"\x7fno program")
    with pytest.raises(build.BuildError, match=r"c\+\+ cannot be run \(Exec format error\); set another CXX"):
        build.library(compiler.environment)


def test_a_compiler_that_writes_nothing_is_told_and_not_the_folder(compiler):
    compiler.command.write_text("#!/bin/sh\nexit 0\n")
    words = "could not compile the kernels: it ended without an error, and wrote no library$"
    with pytest.raises(build.BuildError, match=words):
        build.library(compiler.environment)


def test_the_last_lines_of_a_compiler_that_fails_are_told(pretended):
    compiler = pretended(before="seq 1 50 >&2; echo 'vectors.h:3: error: no such thing' >&2; exit 1")
    with pytest.raises(build.BuildError, match=r"could not compile the kernels: 40\n(.*\n)*.*no such thing"):
        build.library(compiler.environment)
    assert not [path for path in compiler.cache.iterdir() if path.suffix != ".lock"]


def test_a_compiler_that_does_not_know_this_cpu_or_openmp_is_asked_for_less(pretended):
    compiler = pretended(before='case "$*" in *native*|*openmp*) echo "unknown option" >&2; exit 1;; esac')
    path = build.library(compiler.environment)
    assert compiler.number_of_calls() == 4
    assert json.loads(path.with_suffix(".json").read_text())["needs"] == []


def test_a_compiler_that_never_answers_is_given_up(pretended, monkeypatch):
    monkeypatch.setattr(build, "_SECONDS", 0.1)
    with pytest.raises(build.BuildError, match=r"no answer after 0.1 seconds"):
        build.library(pretended(before="exec sleep 5").environment)


def test_a_named_cache_that_cannot_be_written_is_told(compiler, tmp_path):
    (tmp_path / "file").write_text("in the way")
    environment = {**compiler.environment, "LIGHTNING_RIGL_CACHE": str(tmp_path / "file" / "cache")}
    with pytest.raises(
        build.BuildError, match=r"kept in none of: .*/file/cache \(Not a directory\); let LIGHT"
    ):
        build.library(environment)
    assert compiler.number_of_calls() == 0


def test_without_a_cache_of_the_user_a_private_folder_serves(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    environment = {
        **compiler.environment,
        "LIGHTNING_RIGL_CACHE": "",
        "XDG_CACHE_HOME": str(tmp_path / "file"),
    }
    path = build.library(environment)
    assert path.parent == tmp_path / "temporary" / f"lightning-rigl-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_code_is_not_loaded_from_a_folder_that_others_may_write_to(compiler):
    path = build.library(compiler.environment)
    compiler.cache.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"cache \(others may write to it\)"):
        build.library(compiler.environment)
    compiler.cache.chmod(0o700)
    assert build.library(compiler.environment) == path


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({"LIGHTNING_RIGL_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/lightning-rigl"),
        ({"HOME": "/c"}, "/c/.cache/lightning-rigl"),
    ],
)
def test_the_cache_lies_where_it_is_asked_to(environment, first):
    assert str(build.cache_folders(environment)[0]) == first


# --- helpers ---


def _copy_of_sources(monkeypatch, folder):
    shutil.copytree(build.SOURCES, folder / "sources", ignore=shutil.ignore_patterns("_kernels*", "*.py*"))
    monkeypatch.setattr(build, "SOURCES", folder / "sources")


def _child(action):
    """The number of a new process that does this and nothing else; it fails unless the answer is true."""
    child = os.fork()
    if child == 0:
        done = False
        try:
            done = action()
        finally:
            os._exit(0 if done else 1)
    return child


def _outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
