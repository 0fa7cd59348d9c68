"""Where connections may live, and among what their counts are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rigl.topology import selection
from lightning_rigl.topology.parts import Part


class Pattern(Part):
    """The rule that every mask of a layer obeys; it turns scores and counts into masks.

    Tensors have the shape of the layer; masks are bool, True = active. Between calls the number of active
    connections is constant: what `drop` takes away, `grow` gives back.
    """

    @abstractmethod
    def fit(self, shape: Sequence[int], count: int) -> int:
        """The count nearest to ``count`` that a layer of this shape can have under the pattern."""

    @abstractmethod
    def start(self, scores: Tensor, count: int) -> Tensor:
        """A first mask: the ``count`` connections of highest score."""

    @abstractmethod
    def drop(self, scores: Tensor, active: Tensor, count: int) -> Tensor:
        """The active connections left when the ``count`` of lowest score are dropped."""

    @abstractmethod
    def grow(self, scores: Tensor, kept: Tensor, count: int) -> Tensor:
        """``kept`` and the ``count`` highest-scored connections outside it."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any connection may be active; counts hold per layer.

    Example:
        >>> import torch
        >>> Unstructured().start(torch.tensor([[0.1, 0.9], [0.5, 0.2]]), 2).tolist()
        [[False, True], [True, False]]
    """

    def fit(self, shape: Sequence[int], count: int) -> int:
        """Every count fits."""
        return count

    def start(self, scores: Tensor, count: int) -> Tensor:
        """The ``count`` highest scores of the layer."""
        return selection.grow(scores, scores.new_zeros(scores.shape).bool(), count)

    def drop(self, scores: Tensor, active: Tensor, count: int) -> Tensor:
        """All active connections but the ``count`` of lowest score."""
        return selection.drop(scores, active, count)

    def grow(self, scores: Tensor, kept: Tensor, count: int) -> Tensor:
        """``kept`` and the ``count`` highest scores outside it."""
        return selection.grow(scores, kept, count)
