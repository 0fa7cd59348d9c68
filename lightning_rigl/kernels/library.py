"""The compiled kernels in this process: loaded at most once, their functions typed, their absence explained.

How a file of calls is made (`product_calls.py` is one; the C side takes plain pointers and numbers):

    def gather(library: Library, dense: Tensor, ...) -> Tensor:
        values = torch.empty(...)
        library("lr_gather", "pnnppipi", dense.data_ptr(), inputs, ..., threads())
        return values

The second argument has a letter for each argument of the C function: ``p`` a pointer (an address, or None
for NULL), ``n`` int64, ``i`` int, ``f`` float, ``d`` double. A letter before a colon is what comes back:
``"n:pp"`` returns int64; without one nothing does. Other threads of Python run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch  # before the kernels: they are to use the OpenMP threads that torch brought along

from lightning_rigl.kernels import build

_TYPES: dict[str, type] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "s": ctypes.c_char_p,
}


class Library:
    """The functions of one shared library, called by name and signature.

    Args:
        path: of a library that `lightning_rigl.kernels.build.library` gave.

    Raises:
        OSError: the system's loader refuses it, or it was made for another interface.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        self._functions: dict[str, Callable[..., Any]] = {}
        if self("lr_abi", "i:") != build.ABI:
            raise OSError(f"{path}: made for interface {self('lr_abi', 'i:')}, and this is {build.ABI}")
        self.isa: str = self("lr_isa", "s:").decode()  # of "avx512", "avx2", "neon", "generic"
        self.panel: int = self("lr_panel", "i:")  # columns of a batch that lie together in a panel

    def __call__(self, name: str, signature: str, *arguments: object) -> Any:
        """Call the function ``name``, whose ``signature`` is in the letters that this module describes."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._typed(name, signature)
        return function(*arguments)

    def _typed(self, name: str, signature: str) -> Callable[..., Any]:
        returned, _, taken = signature.rpartition(":")
        function = getattr(self._handle, name)
        function.argtypes = [_TYPES[letter] for letter in taken]
        function.restype = _TYPES[returned] if returned else None
        return function  # type: ignore[no-any-return] # ctypes has no type for it


class Loader:
    """Kernels on request: the first request finds or compiles them, the later ones get the same answer.

    Args:
        environment: ``LIGHTNING_RIGL_NATIVE=0`` refuses them; for the others see `build.library`.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._library: Library | None = None
        self._why_not = "not asked for yet"

    def load(self) -> Library | None:
        """The library, or None where it cannot be had; `why_not` has the reason then. Never raises."""
        with self._lock:
            if self._library is None and self._why_not == "not asked for yet":
                try:
                    self._library, self._why_not = self._find(), ""
                except (build.BuildError, OSError, AttributeError, ValueError, UserWarning) as trouble:
                    self._why_not = str(trouble)
        return self._library

    def loaded(self) -> Library | None:
        """The library if an earlier `load` got it; compiles nothing."""
        return self._library

    def why_not(self) -> str:
        """In words why there is no library; empty when there is one."""
        return self._why_not

    def _find(self) -> Library:
        if self._environment.get("LIGHTNING_RIGL_NATIVE", "1") == "0":
            raise build.BuildError("LIGHTNING_RIGL_NATIVE=0 refuses the kernels; unset it to have them")
        return self._usable({})

    def _usable(self, refused: Mapping[Path, str]) -> Library:
        """A library other than those that the system refused before, with its words, or one compiled anew."""
        try:
            path = build.library(self._environment, refused.keys())
        except build.BuildError as trouble:
            raise build.BuildError("; ".join([*refused.values(), str(trouble)])) from trouble
        try:
            return Library(path)
        except (OSError, AttributeError) as trouble:
            if path in refused:
                raise build.BuildError(f"{trouble}, though compiled anew; set another CXX") from trouble
            return self._usable({**refused, path: str(trouble)})


_PROCESS = Loader(os.environ)  # code is loaded once a process, whoever asks


def load() -> Library | None:
    """The kernels of this process: prebuilt, cached or compiled now; None where that fails. Never raises."""
    return _PROCESS.load()


def loaded() -> Library | None:
    """The kernels if someone loaded them before; never compiles."""
    return _PROCESS.loaded()


def why_not() -> str:
    """In words why `load` gave None; empty when it gave a library."""
    return _PROCESS.why_not()


def threads() -> int:
    """How many threads a kernel may use: as many as torch does."""
    return torch.get_num_threads()
