"""Checkpoints of a sparse run in less space: around the strategy's own reading and writing of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_rigl.export.checkpoints import pack_checkpoint, unpack_checkpoint


class PackedCheckpoints(CheckpointIO):
    """Packs what is saved, and unpacks what is loaded; plain checkpoints are loaded as ever.

    Args:
        inner: writes and reads the files.
        masks: the masks of this moment.
    """

    def __init__(self, inner: CheckpointIO, masks: Callable[[], Mapping[str, Tensor]]) -> None:
        self.inner, self._masks = inner, masks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a packed checkpoint."""
        self.inner.save_checkpoint(pack_checkpoint(checkpoint, self._masks()), path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, packed or plain."""
        return unpack_checkpoint(self.inner.load_checkpoint(path, *args, **kwargs))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the inner one end its work."""
        self.inner.teardown()


def pack(trainer: Trainer, masks: Callable[[], Mapping[str, Tensor]]) -> None:
    """From here on the trainer's checkpoints are packed."""
    if not isinstance(trainer.strategy.checkpoint_io, PackedCheckpoints):
        trainer.strategy.checkpoint_io = PackedCheckpoints(trainer.strategy.checkpoint_io, masks)
