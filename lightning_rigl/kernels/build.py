"""One shared library from the C++ files of this folder: compiled once into a cache, proved at every load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ABI = 1  # of the functions' signatures; `lr_abi` in products.cpp gives the same number

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",  # a product and a sum may become one operation; nan and inf stay what they are
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
)
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())  # the first accepted
_SECONDS = 300
_LINES = 12  # of a compiler's message that are repeated


class BuildError(RuntimeError):
    """The kernels cannot be had on this machine; the message says why and what helps."""


def library(environment: Mapping[str, str], refused: Collection[Path] = ()) -> Path:
    """The path of kernels that fit these sources and this machine, compiled now if there are none yet.

    A library kept beside the sources (as in a wheel) comes first, then one in the cache. Each has a stamp
    beside it, which says of which sources it was made, what it asks of the CPU, and its checksum; one that
    does not fit is passed over, and one in the cache is compiled anew, which a warning says before. Where
    there is no compiler, any one in the cache that fits is taken. Several processes may ask at once: one
    compiles, the others wait for it, and no one ever sees half a file.

    Args:
        environment: ``LIGHTNING_RIGL_CACHE`` names the cache folder, ``CXX`` the compiler.
        refused: what this gave before and the system did not load: passed over, in the cache compiled anew.

    Raises:
        BuildError: there is no compiler, it failed, or nowhere to write.
    """
    kept = [p for p in sorted(SOURCES.glob("_kernels*.so")) if p not in refused and not refusal(p)]
    if kept:
        return max(kept, key=lambda path: len(_stamp(path)["needs"]))
    folders = cache_folders(environment)
    missing, name = None, "kernels-*.so"
    try:
        compiler = find_compiler(environment)
        name = f"kernels-{_key(compiler)}.so"
    except BuildError as error:
        missing = error
    for path in (path for folder in folders for path in sorted(folder.glob(name))):
        if path not in refused and not refusal(path) and not _unsafe(path.parent):
            return path
    if missing:
        raise missing
    troubles = []
    for folder in folders:
        trouble = _fill(folder, name, compiler, folder / name in refused)
        if not trouble:
            return folder / name
        troubles.append(f"{folder} ({trouble})")
    raise BuildError(
        f"the compiled kernels can be kept in none of: {', '.join(troubles)}; let LIGHTNING_RIGL_CACHE name "
        "a folder that can be written"
    )


def _fill(folder: Path, name: str, compiler: Sequence[str], anew: bool) -> str:
    """Have the library of this name in this cache; what the file system has against it, if anything."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if unsafe := _unsafe(folder):
            return unsafe
        with _locked(folder / f"{name}.lock"):
            if anew or refusal(folder / name):
                words = f"lightning_rigl compiles its kernels into {folder}; this takes some seconds, once"
                warnings.warn(words, stacklevel=3)
                compile_into(folder / name, compiler)
    except OSError as trouble:
        return trouble.strerror or str(trouble)
    return ""


def refusal(path: Path) -> str:
    """Why the library at this path is not to be loaded, in words; empty when it fits.

    Args:
        path: of a shared library with its stamp (``.json`` in place of the suffix) beside it.
    """
    try:
        stamp, checksum = _stamp(path), _checksum(path)
    except (OSError, ValueError) as trouble:
        return f"{path}: not there or not readable ({trouble})"
    if stamp.get("checksum") != checksum:
        return f"{path}: its checksum is not that of its stamp; the file is damaged"
    if stamp.get("abi") != ABI or stamp.get("sources") != sources_digest():
        return f"{path}: made of other sources than the package's"
    if stamp.get("machine") != platform.machine():
        return f"{path}: made for {stamp.get('machine')}, and this machine is {platform.machine()}"
    missing = sorted(set(stamp.get("needs", ())) - cpu_flags())
    if missing:
        return f"{path}: asks for {', '.join(missing)}, which this CPU does not have"
    return ""


def compile_into(path: Path, compiler: Sequence[str], target: Sequence[str] | None = None) -> None:
    """Compile the sources and put library and stamp in place, each by one rename.

    Args:
        path: of the library to be.
        compiler: the command and its first arguments.
        target: options that choose the instructions, such as ``-march=x86-64-v3``, as prebuilt libraries
            need them; None for those of this machine.

    Raises:
        BuildError: the compiler failed; the message repeats its last lines.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as folder:
        made, stamp = Path(folder) / path.name, Path(folder) / "stamp.json"
        for attempt in _ATTEMPTS if target is None else ((*target, "-fopenmp"), (*target,)):
            trouble = _compile(compiler, (*FLAGS, *attempt), made)
            if not trouble:
                break
        else:
            raise BuildError(f"{shlex.join(compiler)} could not compile the kernels: {trouble}")
        needs = sorted(cpu_flags()) if target is None and "-march=native" in attempt else _needs(attempt)
        facts = {"abi": ABI, "sources": sources_digest(), "machine": platform.machine(), "needs": needs}
        stamp.write_text(json.dumps({**facts, "checksum": _checksum(made)}))
        made.replace(path)
        stamp.replace(path.with_suffix(".json"))


def find_compiler(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The C++ compiler's command: ``CXX``, or the first of g++, c++ and clang++ that is there.

    Raises:
        BuildError: there is none, or ``CXX`` is no command.
    """
    try:
        asked = shlex.split(environment.get("CXX", ""))
    except ValueError as trouble:
        raise BuildError(f"CXX={environment['CXX']} is not a command: {trouble}; set another CXX") from None
    for command in [asked] if asked else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0], path=environment.get("PATH")):
            return tuple(command)
    found = f"CXX={shlex.join(asked)}" if asked else "g++, c++ and clang++"
    raise BuildError(f"no C++ compiler: {found} not found; install one (apt install g++) or set CXX")


def cache_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where compiled kernels may lie, best first: the folder named, or the user's cache and a private one."""
    if named := environment.get("LIGHTNING_RIGL_CACHE"):
        return [Path(named).expanduser().absolute()]
    users = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~")) / ".cache")
    private = Path(tempfile.gettempdir()) / f"lightning-rigl-{os.getuid()}"
    return [users.expanduser().absolute() / "lightning-rigl", private]


def cpu_flags() -> frozenset[str]:
    """What this CPU says it can do, in the kernel's names (``avx2``, ``asimd``); elsewhere its model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                return frozenset(line.partition(":")[2].split())
    return frozenset(platform.processor().split())


def sources_digest() -> str:
    """A checksum of all C++ files, their names and their order."""
    content = b"".join(path.name.encode() + path.read_bytes() for path in _files("*.[ch]*"))
    return hashlib.sha256(content).hexdigest()


def _files(pattern: str) -> list[Path]:
    return [path for path in sorted(SOURCES.glob(pattern)) if path.suffix in (".cpp", ".h")]


def _compile(compiler: Sequence[str], flags: Sequence[str], output: Path) -> str:
    """The last lines of the compiler's message if it failed, else nothing."""
    done = _run([*compiler, *flags, *map(str, _files("*.cpp")), "-o", str(output)])
    if done.returncode == 0:
        return "" if output.is_file() else "it ended without an error, and wrote no library"
    said = done.stderr.strip().splitlines()[-_LINES:]
    return "\n".join(said) or f"exit status {done.returncode}, no message"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]}: no answer after {_SECONDS} seconds; set another CXX") from None
    except OSError as trouble:
        raise BuildError(f"{command[0]} cannot be run ({trouble.strerror}); set another CXX") from None


def _needs(options: Sequence[str]) -> list[str]:
    """The CPU flags without which code of these options must not run."""
    v3 = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_2"]
    levels = {"-march=x86-64-v3": v3}
    levels["-march=x86-64-v4"] = [*v3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]
    return [flag for option in options for flag in levels.get(option, ())]


def _key(compiler: Sequence[str]) -> str:
    """What a cached library depends on, in a file's name."""
    version = _run([*compiler, "--version"]).stdout
    parts = [str(ABI), sources_digest(), *compiler, version, *FLAGS, platform.machine(), *sorted(cpu_flags())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _stamp(path: Path) -> dict[str, Any]:
    stamp = json.loads(path.with_suffix(".json").read_text())
    if not isinstance(stamp, dict):
        raise ValueError("its stamp is no stamp")
    return stamp


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unsafe(folder: Path) -> str:
    """Why a library in this folder might be someone else's: code is loaded only where no one else writes."""
    facts = folder.stat()
    if facts.st_uid not in (os.getuid(), 0):
        return "it belongs to another user"
    return "others may write to it" if facts.st_mode & stat.S_IWOTH else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for this lock, where the file system knows locks."""
    if sys.platform == "win32":
        raise BuildError("the kernels are made on Linux and macOS only")
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a network drive without locks: a second compilation does no harm
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
