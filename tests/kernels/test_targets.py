"""The same kernels for other CPUs and under sanitizers, run over edge shapes by drivers written in C++.

A driver (``*_driver.cpp``) compares with plain loops, in memory of exactly the size needed, and fails by its
exit status.
"""

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from lightning_rigl.kernels import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the kernels are not made for Windows"),
]

DRIVERS = sorted(Path(__file__).parent.glob("*_driver.cpp"))
FLAGS = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-march=native"]
X86 = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3", "generic": "-march=x86-64"}
CROSS = "aarch64-linux-gnu-g++"

drivers = pytest.mark.parametrize("driver", DRIVERS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


@cache
def objects(folder, compiler, flags):
    """The kernels, compiled once for all drivers."""
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    sources = [str(path) for path in sorted(build.SOURCES.glob("*.cpp"))]
    compiled([*compiler, *FLAGS, "-fopenmp", *WARNINGS, *flags, "-c", *sources], place)
    return sorted(str(path) for path in place.glob("*.o"))


def compiled(command, place):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=place)
    assert done.returncode == 0, done.stderr


def made(driver, folder, compiler, *flags):
    """The program, compiled by the flags that the package uses and these."""
    kernels = objects(folder, tuple(compiler), flags)
    program = Path(kernels[0]).parent / driver.stem
    command = [*compiler, *FLAGS, "-fopenmp", *WARNINGS, *flags, str(driver), *kernels, "-o", str(program)]
    compiled(command, folder)
    return program


def passes(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler_here():
    try:
        return build.find_compiler(os.environ)
    except build.BuildError as reason:
        pytest.skip(str(reason))


@drivers
@pytest.mark.parametrize("isa", list(X86))
def test_the_builds_for_older_and_newer_x86_agree_with_plain_loops(driver, isa, folder):
    if platform.machine() != "x86_64":
        pytest.skip(f"{isa} is of x86_64, and this machine is {platform.machine()}")
    missing = set(build._needs([X86[isa]])) - build.cpu_flags()
    if missing:
        pytest.skip(f"this CPU does not have {', '.join(sorted(missing))}")
    assert isa in passes(made(driver, folder, compiler_here(), X86[isa]))


@drivers
def test_the_address_and_undefined_behaviour_sanitizers_find_nothing(driver, tmp_path, folder):
    compiler = compiler_here()
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}")
    works = subprocess.run(
        [*compiler, *SANITIZED, trial, "-o", tmp_path / "trial"], capture_output=True, text=True
    )
    if works.returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers here: {works.stderr.strip()[-200:]}")
    passes(made(driver, folder, compiler, *SANITIZED))


@drivers
def test_the_build_for_neon_agrees_with_plain_loops(driver, folder):
    if platform.machine() in ("aarch64", "arm64"):
        assert "neon" in passes(made(driver, folder, compiler_here()))
        return
    absent = [tool for tool in (CROSS, "qemu-aarch64") if not shutil.which(tool)]
    if absent:
        packages = "g++-aarch64-linux-gnu qemu-user"
        pytest.skip(f"NEON is untested here: {' and '.join(absent)} not found (apt install {packages})")
    program = made(
        driver, folder, [CROSS], "-static", "-Wno-error"
    )  # libgomp warns of dlopen in a static program
    assert "neon" in passes("qemu-aarch64", program)
