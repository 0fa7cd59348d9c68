"""A wheel built with a compiler brings the kernels for old and new processors, one without brings sources."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from lightning_rigl.kernels import build

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip("setuptools", minversion="77")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the kernels are made on Linux and macOS only"),
    pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="no pip here"),
]

PRODUCT = """
import sys, torch
from lightning_rigl.kernels import build, library, product_calls
if sys.argv[1:]:
    build.cpu_flags = lambda: frozenset(build._needs([sys.argv[1]]))
kernels = library.load()
assert kernels, library.why_not()
starts, columns = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
y = product_calls.linear(kernels, torch.tensor([[1.0, 2.0, 4.0]]), starts, columns, torch.ones(3), None)
assert y.tolist() == [[4.0, 3.0]]
print(kernels.isa, kernels.path)
"""


def run(*command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(tree, folder, **environment):
    run(
        "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder),
        folder=tree, **environment,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def kernels_in(wheel):
    with zipfile.ZipFile(wheel) as files:
        return {Path(name).name for name in files.namelist() if name.startswith("lightning_rigl/kernels/")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of all that a wheel is made of, in which building leaves its traces."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "lightning_rigl", tree / "lightning_rigl", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    try:
        build.find_compiler(os.environ)
    except build.BuildError as reason:
        pytest.skip(str(reason))
    return wheel_of(tree, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), folder=target)
    return target


def test_a_wheel_with_kernels_is_of_this_platform_and_of_any_python(wheel):
    system = sysconfig.get_platform().split("-")[0]
    assert f"-py3-none-{system}" in wheel.name
    stamps = {name.replace(".so", ".json") for name in kernels_in(wheel) if name.endswith(".so")}
    assert stamps
    assert stamps == {name for name in kernels_in(wheel) if name.endswith(".json")}


def test_the_installed_kernels_need_no_compiler_and_no_cache(installed, tmp_path):
    said = run(
        "-c", PRODUCT,
        folder=tmp_path, PYTHONPATH=str(installed), CXX="/bin/false",
        LIGHTNING_RIGL_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert Path(said.split()[1]).parent == installed / "lightning_rigl" / "kernels"
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there are no levels elsewhere")
@pytest.mark.parametrize(
    ("level", "isa"), [("x86-64", "generic"), ("x86-64-v3", "avx2"), ("x86-64-v4", "avx512")]
)
def test_each_processor_gets_the_best_kernels_that_it_can_run(installed, tmp_path, level, isa):
    needs = build._needs([f"-march={level}"])
    missing = set(needs) - build.cpu_flags()
    if missing:
        pytest.skip(f"this CPU does not have {', '.join(sorted(missing))}")
    said = run("-c", PRODUCT, f"-march={level}", folder=tmp_path, PYTHONPATH=str(installed), CXX="/bin/false")
    assert said.split()[0] == isa
    assert Path(said.split()[1]).is_relative_to(installed)


@pytest.mark.parametrize("compiler", ["/nonexistent", "/bin/false"])
def test_without_a_compiler_a_wheel_of_sources_is_made_even_after_one_with_kernels(
    wheel, tree, tmp_path, compiler
):
    pure = wheel_of(tree, tmp_path, CXX=compiler)
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in kernels_in(pure) if name.startswith("_kernels")]
    sources = {path.name for path in build.SOURCES.iterdir() if path.suffix in (".cpp", ".h", ".py")}
    assert kernels_in(pure) == sources


@pytest.mark.parametrize("kind", ["sdist", "editable"])
def test_archives_of_sources_and_editable_installs_compile_nothing(tree, tmp_path, kind):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
    name = run("-c", code, folder=tree).split()[-1]
    assert name.endswith(".tar.gz" if kind == "sdist" else "-py3-none-any.whl")
    assert not list((tree / "lightning_rigl").rglob("_kernels*"))


def test_an_archive_of_sources_has_all_that_a_wheel_is_made_of(tree, tmp_path):
    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", folder=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"setup.py", *(path.name for path in build.SOURCES.glob("*.[ch]*"))} <= files
