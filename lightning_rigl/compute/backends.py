"""Who computes products with a sparse weight: torch's own sparse kernels, or the native ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rigl.compute.structure import Structure, compressed, compressed_natively
from lightning_rigl.kernels import layer_calls, library, product_calls
from lightning_rigl.kernels.library import Library

_EXAMPLES = 64  # of a batch that torch's product takes together, to stay in the cache


class Backend(ABC):
    """Products on the CPU, in float32, that touch the active connections of a weight W only."""

    @abstractmethod
    def structure(self, mask: Tensor) -> Structure:
        """The indices of a bool mask of shape (outputs, inputs), as this backend wants them."""

    @abstractmethod
    def gather(self, weight: Tensor, s: Structure) -> Tensor:
        """The weights of the connections, of shape (connections,)."""

    @abstractmethod
    def linear_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, s: Structure
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Y = X W^T + b of shape (batch, outputs), of X (batch, inputs) and a dense W.

        Returns:
            Y, or None where X is not finite; X as the backward pass wants it; the connections' weights.
        """

    @abstractmethod
    def linear_backward(
        self,
        grad: Tensor,
        kept: Tensor,
        values: Tensor,
        s: Structure,
        needs: tuple[bool, bool],
        into: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of X, None where that of Y is not finite, and of the connections.

        The latter go to their places of the dense matrix ``into`` if there is one, and None is returned.
        """


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite, and so is their sum."""
    return bool(x.sum().isfinite())


@dataclass(frozen=True)
class TorchBackend(Backend):
    """Compressed rows in torch: W @ X^T with 32-bit indices, and sampled products for the weight.

    No compiler is needed; torch must have MKL. On the CPU, X @ W^T and 64-bit indices are slower by
    factors.
    """

    def structure(self, mask: Tensor) -> Structure:
        """See `Backend.structure`."""
        return compressed(mask)

    def gather(self, weight: Tensor, s: Structure) -> Tensor:
        """See `Backend.gather`."""
        return weight.reshape(-1).index_select(0, s.places)

    @staticmethod
    def product(x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Y = X W^T + b of shape (batch, outputs), of X (batch, inputs) and compressed rows of W."""
        size = (len(starts) - 1, x.shape[1])
        weight = torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)
        y = x.new_empty(len(x), len(starts) - 1)
        parts = max(1, round(len(x) / _EXAMPLES))
        for some, into in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            into.copy_((weight @ some.t().contiguous()).t())  # rows of features are faster than of examples
        return y if bias is None else y.add_(bias)

    def linear_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, s: Structure
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Backend.linear_forward`."""
        values, turned = self.gather(weight, s), x.t().contiguous()
        y = self.product(turned.t(), values, s.starts, s.columns, bias) if is_finite(x) else None
        return y, turned, values

    def linear_backward(
        self,
        grad: Tensor,
        kept: Tensor,
        values: Tensor,
        s: Structure,
        needs: tuple[bool, bool],
        into: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Backend.linear_backward`."""
        dx = dvalues = None
        grad = grad.t().contiguous().t()
        if needs[0] and is_finite(grad):
            turned = values.index_select(0, s.permutation)
            dx = self.product(grad, turned, s.starts_t, s.columns_t, None)
        if needs[1]:
            size, zeros = (s.outputs, s.inputs), torch.zeros_like(values)
            pattern = torch.sparse_csr_tensor(s.starts, s.columns, zeros, size, check_invariants=False)
            dvalues = torch.sparse.sampled_addmm(pattern, grad.t(), kept.t(), beta=0.0).values()
            if into is not None:
                into.view(-1).index_copy_(0, s.places, dvalues)
                dvalues = None
        return dx, dvalues


@dataclass(frozen=True)
class NativeBackend(Backend):
    """The package's own kernels.

    Args:
        library: where they are.
    """

    library: Library

    def structure(self, mask: Tensor) -> Structure:
        """See `Backend.structure`."""
        return compressed_natively(mask, self.library)

    def gather(self, weight: Tensor, s: Structure) -> Tensor:
        """See `Backend.gather`."""
        return product_calls.gather(self.library, weight, s.starts, s.columns)

    def linear_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, s: Structure
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Backend.linear_forward`."""
        return layer_calls.forward(self.library, x, weight, bias, s.starts, s.columns)

    def linear_backward(
        self,
        grad: Tensor,
        kept: Tensor,
        values: Tensor,
        s: Structure,
        needs: tuple[bool, bool],
        into: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Backend.linear_backward`."""
        return layer_calls.backward(self.library, grad, kept, values, s.tensors, needs, into)


def native() -> NativeBackend | None:
    """The native backend, or None where its library cannot be had; `library.why_not` says why."""
    found = library.load()
    return None if found is None else NativeBackend(found)
