"""A Lightning checkpoint whose tensors with many zeros are packed, in plain types, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rigl.export.packing import Entry, Packer, check_packable, checksum, is_entry, unpack
from lightning_rigl.model.layers import clean_name

VERSION = 2  # in version 1 entries had no checksum
MARK = "lightning_rigl_packing"  # the key of a packed checkpoint that holds the version


def pack_checkpoint(checkpoint: Mapping[str, Any], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint with the same content in less space, which `unpack_checkpoint` turns back exactly.

    Everything in it that is a floating tensor with enough zeros is packed: weights on the places of their
    masks, optimizer state and averages on the same places, which are stored once. What is packed is on the
    CPU. The rest is the same objects, and the checkpoint that was given stays as it is.

    Args:
        checkpoint: what ``Trainer.save_checkpoint`` writes, or any nested dict of tensors.
        masks: cleaned parameter name -> bool mask; the names are looked up in ``checkpoint["state_dict"]``.

    Raises:
        ValueError: a mask fits no entry of the state dict; or the checkpoint is packed already.

    Example:
        >>> weight = torch.zeros(8, 16)
        >>> weight[0, 0] = 1.0
        >>> packed = pack_checkpoint({"state_dict": {"weight": weight}}, {"weight": weight != 0})
        >>> entry, = packed["state_dict"].values()
        >>> entry["values"]
        tensor([1.])
        >>> unpacked, = unpack_checkpoint(packed)["state_dict"].values()
        >>> unpacked.equal(weight)
        True
    """
    if MARK in checkpoint:
        raise ValueError("the checkpoint is packed already")
    state = checkpoint.get("state_dict", {})
    packer = Packer()
    for key, mask in masks_by_key(state, masks).items():
        if _is_plain(state[key]):
            packer.pack(state[key], mask)

    def leaf(value: Any, path: str) -> Any:
        if not isinstance(value, Tensor) or not _is_plain(value):
            return value
        if value.dtype == torch.uint8:
            return packer.shared(value)  # the masks of the callback are the same bits
        entry: Entry = packer.pack(value) if value.is_floating_point() else {"encoding": "whole"}
        if entry["encoding"] == "whole":
            return value
        if "crc32" not in entry:  # else it is tied to another one
            entry["crc32"] = checksum(entry)
        return entry

    packed = {key: walk(value, leaf, key) for key, value in checkpoint.items()}
    return {**packed, MARK: VERSION}


def unpack_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that `pack_checkpoint` packed; one that is not packed, as it is.

    Optimizer state comes back as it was saved: that of `ActiveSGD` and `ActiveAdamW` holds active connections
    only, packed or not. A fit resumed with RigLCallback makes it dense where torch's optimizer goes on.

    Raises:
        ValueError: it was packed by a newer version, or an entry is damaged, which a checksum tells.
    """
    if MARK not in checkpoint:
        return dict(checkpoint)
    if (version := checkpoint[MARK]) not in (1, VERSION):
        raise ValueError(
            f"the checkpoint is packed in format {version!r} and this version reads 1 and {VERSION}; update "
            "lightning-rigl"
        )
    known: dict[int, Tensor] = {}

    def leaf(value: Any, path: str) -> Any:
        if is_entry(value) and id(value) not in known:  # tied tensors are one entry
            known[id(value)] = _checked(value, path, version)
        return known.get(id(value), value)

    return {key: walk(value, leaf, key) for key, value in checkpoint.items() if key != MARK}


def _checked(entry: Mapping[str, Any], path: str, version: int) -> Tensor:
    """The tensor of an entry that is as it was written."""
    try:
        right = version == 1 or entry.get("crc32") == checksum(entry)
        tensor, why = unpack(entry) if right else None, " does not have the checksum it was written with"
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        tensor, why = None, f": {error}"
    if tensor is None:
        raise ValueError(f"the checkpoint is damaged: {path}{why}; take another copy")
    return tensor


def masks_by_key(state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks by the names of a state dict, which may have the prefixes of wrappers.

    Raises:
        ValueError: a mask fits no entry.
    """
    keys = {clean_name(key): key for key in state}
    for name, mask in masks.items():
        entry = state.get(keys.get(name, name))
        if not isinstance(entry, Tensor):
            raise ValueError(
                f"{name}: there is a mask of that name and no tensor in the state dict, which has "
                f"{', '.join(list(keys)[:5])}, ...; give the masks of this model"
            )
        if entry.shape != mask.shape:
            raise ValueError(
                f"{name}: the mask is {tuple(mask.shape)} and the tensor {tuple(entry.shape)}; give the "
                "masks of this model"
            )
    return {keys.get(name, name): mask for name, mask in masks.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Whether it can be packed; shards of a distributed tensor and the like stay as they are."""
    try:
        check_packable(tensor)
    except TypeError:
        return False
    return True


def walk(tree: Any, leaf: Callable[[Any, str], Any], path: str = "") -> Any:
    """The tree with its leaves replaced, in new containers; an entry of the packing is a leaf.

    Containers are dicts, lists and tuples; others are leaves, for torch.load would not read them safely.

    Args:
        tree: of containers and leaves.
        leaf: a leaf and its path -> what takes its place.
        path: of the tree: the keys that lead to it, with ``/`` between them.
    """
    if type(tree) in (dict, OrderedDict) and not is_entry(tree):
        new = copy.copy(tree)  # with the attributes of a state dict
        new.update({key: walk(value, leaf, f"{path}/{key}") for key, value in tree.items()})
        return new
    if type(tree) in (list, tuple):
        return type(tree)(walk(value, leaf, f"{path}/{i}") for i, value in enumerate(tree))
    return leaf(tree, path)
