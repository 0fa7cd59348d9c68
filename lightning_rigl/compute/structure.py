"""Where the connections of a layer are: compressed rows of a mask, and of its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_rigl.kernels import topology_calls
from lightning_rigl.kernels.library import Library


@dataclass(frozen=True)
class Structure:
    """The active connections of a matrix in row-major order, and in column-major order.

    Args:
        starts: int32 of shape (outputs + 1,): row o holds the connections starts[o] to starts[o + 1].
        columns: of shape (connections,): the input of each; int32, or uint16 for the native kernels.
        starts_t: int32 of shape (inputs + 1,), of the transpose.
        columns_t: of shape (connections,): the output of each connection of the transpose.
        permutation: int32 of shape (connections,): place in row-major order of each one of the transpose.
        known_places: `places`, if they are at hand.
    """

    starts: Tensor
    columns: Tensor
    starts_t: Tensor
    columns_t: Tensor
    permutation: Tensor
    known_places: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that there are, in order: what the structure can be made of again."""
        first = [self.starts, self.columns, self.starts_t, self.columns_t, self.permutation]
        return first if self.known_places is None else [*first, self.known_places]

    @property
    def outputs(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @property
    def inputs(self) -> int:
        """Number of columns."""
        return len(self.starts_t) - 1

    @property
    def count(self) -> int:
        """Number of connections."""
        return len(self.columns)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Starts and columns."""
        return self.starts, self.columns

    @cached_property
    def indices(self) -> Tensor:
        """Rows and columns of the connections, int64 of shape (2, connections)."""
        return torch.stack([self.places // self.inputs, self.places % self.inputs])

    @cached_property
    def places(self) -> Tensor:
        """Flat indices of the connections in the dense matrix, int64."""
        if self.known_places is not None:
            return self.known_places
        rows = torch.arange(self.outputs, device=self.starts.device).repeat_interleave(self.starts.diff())
        return rows * self.inputs + self.columns.to(torch.int64)


def compressed(mask: Tensor) -> Structure:
    """The structure of a bool mask of shape (outputs, inputs), with int32 indices and known places.

    Example:
        >>> found = compressed(torch.tensor([[True, False, True], [False, False, True]]))
        >>> found.starts.tolist(), found.columns.tolist()
        ([0, 2, 3], [0, 2, 2])
        >>> found.starts_t.tolist(), found.columns_t.tolist(), found.permutation.tolist()
        ([0, 1, 1, 3], [0, 0, 1], [0, 1, 2])
    """
    across, places = mask.t().contiguous(), mask.reshape(-1).nonzero().view(-1)
    number = mask.reshape(-1).cumsum(0, dtype=torch.int32).sub_(1).view(mask.shape)
    starts, columns = _rows(mask)
    starts_t, columns_t = _rows(across)
    return Structure(starts, columns, starts_t, columns_t, number.t().contiguous()[across], places)


def compressed_natively(mask: Tensor, library: Library) -> Structure:
    """As `compressed`, made by the native kernels; columns that fit 16 bits are uint16."""
    starts, columns = topology_calls.csr(library, mask)
    return Structure(starts, columns, *topology_calls.transpose(library, starts, columns, mask.shape[1]))


def _rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
    starts[1:] = mask.sum(1).cumsum(0)
    return starts, mask.nonzero()[:, 1].to(torch.int32)
