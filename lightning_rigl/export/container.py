"""Nested plain data with tensors in it as one safetensors file, written whole and checked when read.

Its metadata hold the name and version of this format and, as JSON, the data with names in place of tensors
and the dtype, shape and crc32 of each tensor; a crc32 of that text itself is beside it. A tensor that occurs
twice is stored once.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "lightning_rigl.packed"
VERSION = 1
# safetensors has no names for these
_AS_BYTES = {"torch.complex128": torch.complex128, "torch.complex32": torch.complex32}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts, lists and tuples of numbers, strings and tensors to a file.

    The tensors are contiguous and on the CPU. The file is written beside ``path`` and moved there.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: something in it is of another type.
    """
    save_file = _safetensors().torch.save_file
    tensors = _Tensors()
    text = json.dumps({"content": tensors.named(content, ""), "tensors": tensors.descriptions()})
    meta = {"format": FORMAT, "version": str(VERSION), "contents": text, "crc32": _crc(text.encode())}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        save_file(tensors.stored, beside, metadata=meta)
        beside.chmod(mode)  # safetensors lets nobody else read it
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; a tensor may be a view of the file, so copy what is to stay.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is missing, damaged, cut off, of another kind or of another version.
    """
    safe_open = _safetensors().safe_open
    if not path.is_file():
        raise ValueError(f"no file at {str(path)!r}; give one that export.save wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:  # a class of its own, OSError, ...
        raise ValueError(
            f"{str(path)!r} cannot be read as a safetensors file, it is cut off, damaged or of another kind: "
            f"{error}"
        ) from error
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} was not written by export.save: its format is {meta.get('format')!r} and not "
            f"{FORMAT!r}; safetensors.torch.load_file may read it"
        )
    if meta.get("version") != str(VERSION):
        raise ValueError(
            f"{str(path)!r} has version {meta.get('version')} of its format, and this lightning-rigl reads "
            f"{VERSION}; use the release that wrote the file, or a newer one"
        )
    text = meta.get("contents", "")
    if meta.get("crc32") != _crc(text.encode()):
        raise damaged(path, "its description does not have the checksum it was written with")
    contents = json.loads(text)
    for name in contents["tensors"].keys() | tensors.keys():
        if name not in tensors or _description(tensors[name]) != contents["tensors"].get(name):
            raise damaged(path, f"{name} does not have the checksum it was written with")
    return dict(_restored(contents["content"], tensors))


def damaged(path: Path, why: str) -> ValueError:
    """The error for a file that is not what was written."""
    return ValueError(f"{str(path)!r} is damaged: {why}; save it again, or take another copy")


class _Tensors:
    """The tensors of a file by name."""

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._memory: set[int] = set()

    def named(self, value: Any, path: str) -> Any:
        """The value for JSON: with a name in place of each tensor, and marks where JSON has no such type."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return {"!tensor": self._add(path, value), "!as": str(value.dtype)}
        if type(value) is list and all(type(item) is int for item in value):
            return value
        if isinstance(value, list | tuple):
            items = [self.named(item, f"{path}/{i}") for i, item in enumerate(value)]
            return {"!tuple": items} if isinstance(value, tuple) else items
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{path}: a {type(value).__name__} cannot be saved, only numbers, strings, tensors, and "
                "dicts, lists and tuples of them; leave it out, or save with torch.save"
            )
        pairs = [(self.named(k, path), self.named(v, f"{path}/{k}".lstrip("/"))) for k, v in value.items()]
        if all(type(key) is str and not key.startswith("!") for key, _ in pairs):
            return dict(pairs)
        return {"!items": pairs}

    def descriptions(self) -> dict[str, list[Any]]:
        """By which they are known when they are read."""
        return {name: _description(tensor) for name, tensor in self.stored.items()}

    def _add(self, name: str, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = name
            stored = tensor.reshape(-1).view(torch.uint8) if str(tensor.dtype) in _AS_BYTES else tensor
            memory = stored.untyped_storage()
            shared = memory.nbytes() != stored.nbytes or memory.data_ptr() in self._memory
            self._memory.add(memory.data_ptr())
            self.stored[name] = stored.clone() if shared else stored  # safetensors refuses parts of a memory
        return self._names[id(tensor)]


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "!tensor" in value:
        tensor = tensors[value["!tensor"]]
        kind = _AS_BYTES.get(value["!as"])
        return tensor if kind is None else tensor.clone().view(kind)  # bytes lie at any address in the file
    if "!tuple" in value:
        return tuple(_restored(item, tensors) for item in value["!tuple"])
    if "!items" in value:
        return {_restored(k, tensors): _restored(v, tensors) for k, v in value["!items"]}
    return {key: _restored(item, tensors) for key, item in value.items()}


def _description(tensor: Tensor) -> list[Any]:
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), _crc(data)]


def _crc(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("export.save and export.load need safetensors: pip install safetensors") from error
    return safetensors
