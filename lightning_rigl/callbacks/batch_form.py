"""What a batch looks like: batches that look alike cost the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def signature(batch: Any) -> str:
    """Form, shapes, types and flags of a batch: batches that share them cost the same."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {batch.dtype}"
    if isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, (str, bytes)):
        parts = batch.items() if isinstance(batch, Mapping) else ((None, value) for value in batch)
    else:
        parts = getattr(batch, "__dict__", {}).items()  # of a dataclass, or of a user's own
    inside = ", ".join(f"{key}: {signature(value)}" for key, value in parts)
    return str(batch) if isinstance(batch, bool) else f"{type(batch).__name__}({inside})"
