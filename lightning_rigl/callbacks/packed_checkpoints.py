"""Checkpoints of a sparse run in less space: around the strategy's own reading and writing of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_rigl.export.checkpoints import pack_checkpoint, unpack_checkpoint

Masks: TypeAlias = Callable[[], Mapping[str, Tensor]]


class PackedCheckpoints(CheckpointIO):
    """Unpacks what is loaded, and packs what is saved if that is wanted; plain files are read as ever.

    Args:
        inner: writes and reads the files.
        masks: the masks of this moment; None where nothing is to be packed.
    """

    def __init__(self, inner: CheckpointIO, masks: Masks | None) -> None:
        self.inner, self._masks = inner, masks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, packed if that is wanted; what started processes hand over stays plain."""
        if self._masks is not None and "state_dict" in checkpoint:
            checkpoint = pack_checkpoint(checkpoint, self._masks())
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, packed or plain."""
        return unpack_checkpoint(self.inner.load_checkpoint(path, *args, **kwargs))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the inner one end its work."""
        self.inner.teardown()


def around(trainer: Trainer, masks: Masks | None) -> None:
    """From here on the trainer reads packed checkpoints, and writes them if there are masks."""
    inner = trainer.strategy.checkpoint_io
    if masks is None and "XLA" in type(trainer.strategy).__name__:
        return  # it takes no other than its own
    if isinstance(inner, PackedCheckpoints):
        inner = inner.inner
    trainer.strategy.checkpoint_io = PackedCheckpoints(inner, masks)
