"""A sparse model in, a smaller or faster model or file out; usable without Lightning."""

from lightning_rigl.export.advice import advise
from lightning_rigl.export.checkpoints import pack_checkpoint, unpack_checkpoint
from lightning_rigl.export.compaction import compact
from lightning_rigl.export.files import load, save
from lightning_rigl.export.onnx import to_onnx
from lightning_rigl.export.sparse_model import sparse
from lightning_rigl.export.two_four import semi_structured

__all__ = [
    "advise",
    "compact",
    "load",
    "pack_checkpoint",
    "save",
    "semi_structured",
    "sparse",
    "to_onnx",
    "unpack_checkpoint",
]
