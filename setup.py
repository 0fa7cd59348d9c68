"""Wheels bring compiled kernels where they are built with a compiler; all else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

KERNELS = Path("lightning_rigl", "kernels")
BASE = "-march=x86-64"
LEVELS = {"x86_64": (BASE, f"{BASE}-v3", f"{BASE}-v4")}  # the best that a processor knows is taken at load


def build_module() -> ModuleType:
    """The package's `kernels/build.py` alone: the package itself needs torch, which may not be there."""
    spec = importlib.util.spec_from_file_location("kernels_build", KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_level(build: ModuleType, folder: Path, level: str) -> str:
    """Compile the kernels for this level of processors; in words why that failed, if it did."""
    path = folder / f"_kernels{level.removeprefix(BASE)}.so"
    try:
        build.compile_into(path, build.find_compiler(os.environ), level.split())
    except build.BuildError as reason:
        return str(reason)
    return ""


def prebuild(folder: Path) -> str:
    """Compile the kernels for all levels that the compiler knows; in words why there are none, if so."""
    if sys.platform == "win32":
        return "they are made on Linux and macOS only"
    build = build_module()
    troubles = [compile_level(build, folder, level) for level in LEVELS.get(platform.machine(), ("",))]
    return troubles[0] if all(troubles) else ""


class Wheel(bdist_wheel):
    """A wheel of this platform that has the kernels, or one of every platform that has their sources only."""

    def run(self) -> None:
        """Compile after the build, which makes the folder, and before it is asked whether all is pure."""
        self.run_command("build")
        folder = Path(self.get_finalized_command("build").build_lib) / KERNELS
        for earlier in folder.glob("_kernels*"):
            earlier.unlink()
        if trouble := prebuild(folder):
            self.warn(f"no kernels in this wheel, they will be compiled on first use: {trouble}")
        else:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Of any Python, as the kernels know nothing of it."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": Wheel})
