"""Masks in and out of files, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rigl.methods.base import Method
from lightning_rigl.model import sharding
from lightning_rigl.topology import bits
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.patterns import Pattern

VERSION = 2  # of the saved state


def check_masks(
    masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], may_be_empty: bool = False
) -> None:
    """Raise ValueError unless every mask is bool, fits a parameter and has an active connection.

    Methods that count over the whole model may empty a layer: ``may_be_empty``.
    """
    if not masks:
        raise ValueError("the masks are empty: there is no layer to make sparse")
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(
                f"masks do not fit the model: it has no parameter {name!r}, but "
                f"{', '.join(list(parameters)[:5])}, ..."
            )
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name}: a mask is a bool tensor, got {type(mask).__name__}")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"masks do not fit the model: {name} is {tuple(mask.shape)} in the masks and "
                f"{tuple(parameters[name].shape)} in the model"
            )
        if not parameters[name].is_floating_point():
            raise ValueError(
                f"{name}: only floating parameters can be sparse, it is {parameters[name].dtype}"
            )
        if mask.dtype != torch.bool or not (may_be_empty or mask.any()):
            raise ValueError(f"{name}: a mask is a bool tensor with at least one True, got {mask.dtype}")


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read masks from a Lightning checkpoint of a sparse run, or from a file saved as ``torch.save(masks)``.

    Args:
        path: a local file, or the folder of a sharded checkpoint.

    Returns:
        Cleaned parameter name -> bool tensor on the CPU, True = active.

    Raises:
        ValueError: the file is missing, or holds no masks.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "masks.pt"
        >>> torch.save({"fc.weight": torch.tensor([[True, False]])}, file)
        >>> load_masks(file)
        {'fc.weight': tensor([[ True, False]])}
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)  # a folder: a sharded checkpoint
    if not file.is_file():
        raise ValueError(f"no file at {str(file)!r}; give a checkpoint, or masks saved with torch.save")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{str(file)!r} cannot be read as a checkpoint or as masks: {error}") from error
    states = content.get("callbacks", {"": content}) if isinstance(content, dict) else {}
    for state in (s for s in states.values() if isinstance(s, dict)):
        if isinstance(state.get("masks"), dict):
            return unpack_masks(state["masks"])
        if state and all(isinstance(m, Tensor) and m.dtype == torch.bool for m in state.values()):
            return dict(state)
    raise ValueError(
        f"{str(path)!r} holds no masks: it is no checkpoint of a run with RigLCallback (a checkpoint with "
        "save_weights_only=True has none; load its weights and use init='nonzero')"
    )


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks for a checkpoint: one bit a weight, and plain types only."""
    return {
        name: {"shape": list(mask.shape), "bits": bits.pack(sharding.full(mask))}
        for name, mask in masks.items()
    }


def unpack_masks(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that `pack_masks` packed."""
    return {name: bits.unpack(entry["bits"], entry["shape"]) for name, entry in packed.items()}


IDENTITY = ("sparsity", "method", "distribution", "pattern", "include", "exclude")


def identity(
    sparsity: float | dict[str, float],
    method: Method,
    distribution: Distribution,
    pattern: Pattern,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, str]:
    """What a resumed run must share with the one that was saved, in words."""

    def name(part: object) -> str:
        return repr(part) if is_dataclass(part) else type(part).__name__  # other reprs hold an address

    each = {k: float(v) for k, v in sparsity.items()} if isinstance(sparsity, dict) else float(sparsity)
    parts = {"method": method, "distribution": distribution, "pattern": pattern}
    rules = {"include": str(list(include or [])), "exclude": str(list(exclude or []))}
    return {**{kind: name(part) for kind, part in parts.items()}, "sparsity": str(each), **rules}


def check_state(state: Mapping[str, Any], identity: Mapping[str, str]) -> dict[str, Tensor]:
    """The masks of a saved state; ValueError if its format, method, sparsity or distribution is another."""
    if state.get("version") != VERSION:
        raise ValueError(f"the saved state has format {state.get('version')!r}, this version reads {VERSION}")
    for kind, own in identity.items():
        if (saved := state["identity"][kind]) != own:
            raise ValueError(
                f"the checkpoint is of a run with {kind} {saved}, and this one has {own}; resume with the "
                f"same {kind}, or start a new run with init=<checkpoint>"
            )
    return unpack_masks(state["masks"])
