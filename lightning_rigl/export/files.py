"""A sparse model in one safetensors file: places and values of its weights, exact, and checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.compute.optimizers import ActiveStep, compacted
from lightning_rigl.export import container
from lightning_rigl.export.checkpoints import masks_by_key, walk
from lightning_rigl.export.packing import Entry, Packer, check_packable, is_entry, unpack, unpack_mask
from lightning_rigl.model.layers import clean_name


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    masks: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Write a model's state dict to one file, with only the non-zero numbers of sparse tensors in it.

    What comes back from `load` is equal bit by bit, -0.0 and nan included, in the same dtypes and memory
    layouts; tensors that are tied stay tied. The file is written beside ``path`` and then moved there, so
    that ``path`` is never half a file.

    Args:
        model: a module, or a state dict. Every entry must be a plain dense tensor, on any device.
        path: a local file; one that is there is replaced.
        masks: cleaned name -> bool mask, True = active; `load_masks` gives them back. Active weights that are
            zero are kept then.
        optimizer: its state is kept too, on the places of the weights.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: an entry is no plain dense tensor, or the optimizer has state that is no plain data.
        ValueError: a mask fits no entry; there is no folder for the file.

    Example:
        >>> import tempfile, torch
        >>> layer = nn.Linear(64, 32)
        >>> mask = torch.rand(32, 64) < 0.1
        >>> _ = layer.weight.data.masked_fill_(~mask, 0.0)
        >>> path = Path(tempfile.mkdtemp()) / "layer.safetensors"
        >>> save(layer, path, masks={"weight": mask})
        >>> load(path)["weight"].equal(layer.weight), load_masks(path)["weight"].equal(mask)
        (True, True)
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{str(path)!r} cannot be a file: give a file's name in a folder that exists")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, tensor in state.items():
        _check_tensor(name, tensor)
    active = masks_by_key(state, masks or {})
    packer = Packer()
    content: dict[str, Any] = {"model": {name: packer.pack(t, active.get(name)) for name, t in state.items()}}
    if optimizer is not None:
        content["optimizer_kind"] = _kind(optimizer)
        content["optimizer"] = walk(
            optimizer.state_dict(), lambda leaf, _: packer.pack(leaf) if isinstance(leaf, Tensor) else leaf
        )
    container.write(path, content)


def load(
    path: str | Path, model: nn.Module | None = None, optimizer: Optimizer | None = None
) -> dict[str, Tensor]:
    """Read a file of `save`: the dense state dict, on the CPU.

    Args:
        path: a local file.
        model: also load the state dict into it; its entries must be those of the file.
        optimizer: also load the optimizer's state into it; it must be of the same kind, made in the same way.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is missing, damaged, of another kind or of a newer version; or what it holds does
            not fit the model or the optimizer. Nothing has been changed then.
    """
    path = Path(path)
    content = container.read(path)
    known: dict[int, Tensor] = {}
    state = {name: _dense(path, name, entry, known) for name, entry in content["model"].items()}
    if model is not None:
        _check_model(path, state, model.state_dict())
    saved: dict[str, Any] = {}
    if optimizer is not None:
        if "optimizer" not in content:
            raise ValueError(f"{str(path)!r} holds no optimizer; give optimizer= to export.save")
        saved = walk(
            content["optimizer"],
            lambda leaf, place: _dense(path, place, leaf, known) if is_entry(leaf) else leaf,
            "optimizer",
        )
        _check_optimizer(path, saved, content.get("optimizer_kind"), optimizer)
    if model is not None:
        model.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(saved)
    return state


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks that were given to `save`: cleaned name -> bool tensor on the CPU; empty if there were none.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is missing, damaged, of another kind or of a newer version.
    """
    entries = container.read(Path(path))["model"]
    masks = {clean_name(name): unpack_mask(entry) for name, entry in entries.items()}
    return {name: mask for name, mask in masks.items() if mask is not None}


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: only tensors can be saved, it is a {type(tensor).__name__}; give a state dict without "
            "it, or save with torch.save"
        )
    try:
        check_packable(tensor)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def _check_model(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if wrong := sorted(state.keys() ^ own.keys()):
        which = "the file" if wrong[0] in state else "the model"
        raise ValueError(f"{str(path)!r} holds another model: {wrong[0]} is in {which} only")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{str(path)!r} holds another model: {name} is {tuple(tensor.shape)} in the file and "
                f"{tuple(own[name].shape)} in the model"
            )


def _check_optimizer(path: Path, saved: Mapping[str, Any], kind: str | None, own: Optimizer) -> None:
    if kind not in (None, _kind(own)):
        raise ValueError(
            f"{str(path)!r} holds the state of {kind}, and this is {_kind(own)}; make the optimizer as in "
            "the run that saved the file, or load the model alone"
        )
    theirs, mine = (
        [len(g["params"]) for g in groups] for groups in (saved["param_groups"], own.param_groups)
    )
    if theirs != mine:
        raise ValueError(
            f"{str(path)!r} holds an optimizer with groups of {theirs} parameters, and this one has {mine}; "
            "make it as in the run that saved the file"
        )
    parameters = [p for group in own.param_groups for p in group["params"]]
    for index, state in saved["state"].items() if not isinstance(own, ActiveStep) else ():
        for key in compacted(state, parameters[index]):
            raise ValueError(
                f"{str(path)!r}: {key} of parameter {index} is of active connections only, as ActiveSGD and "
                f"ActiveAdamW keep it; load it into one of them, this is {type(own).__name__}"
            )


def _kind(optimizer: Optimizer) -> str:
    """The optimizer of torch that it is one of, or else its class: ActiveSGD is an SGD."""
    kinds = [
        k for k in type(optimizer).__mro__ if k.__module__.startswith("torch.optim.") and k is not Optimizer
    ]
    return [*kinds, type(optimizer)][0].__name__


def _dense(path: Path, name: str, entry: Entry, known: dict[int, Tensor]) -> Tensor:
    """The tensor of an entry, in memory of its own; one tensor for entries that are tied."""
    values = entry["values"]
    if id(values) not in known:
        try:
            dense = unpack(entry)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise container.damaged(path, f"{name}: {error}") from error
        # a whole one is a view of the file, which may change
        known[id(values)] = dense.clone() if entry["encoding"] == "whole" else dense
    return known[id(values)]
