"""The best dense baseline of a machine: MKL's best kernels, on a processor of another vendor, too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_MARK = "LIGHTNING_RIGL_FAIR"
_SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def fair() -> bool:
    """Whether MKL takes this process's processor for one of its vendor."""
    return os.environ.get(_MARK) == "1"


def start_fair() -> None:
    """Begin this script again as a process in which MKL's check of the vendor says yes.

    MKL gives processors of other vendors its AVX2 kernels, which makes dense products half as fast and every
    comparison with them flattering. Only this process is changed.
    """
    if fair():
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "vendor.c").write_text(_SOURCE)
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "vendor.so"), str(folder / "vendor.c")]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(folder / "vendor.so"), _MARK: "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
