"""One sparse parameter: its mask, and the zeros that the mask means."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_rigl.model import sharding
from lightning_rigl.topology import bits


class SparseLayer:
    """A parameter and its mask; both change here and nowhere else, in place.

    The mask of a parameter that is sharded over processes is sharded alike; the count is that of the whole.

    Args:
        name: cleaned name of the parameter.
        parameter: floating; inactive weights become zero.
        mask: bool tensor of the parameter's shape, whole or sharded alike, True = active. It is taken over.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        self.name, self.parameter = name, parameter
        self.mask = mask if sharding.is_sharded(mask) else sharding.shard(mask, parameter)
        self.last = -1  # the step of the last update
        self._recount()

    def _recount(self) -> None:
        """Count the mask, make its integer form (a full layer needs none), and mask the weight."""
        whole = sharding.full(self.mask)
        self.count = int(whole.count_nonzero())
        self.digest = bits.digest(whole) if sharding.together() else 0  # to be compared between processes
        own, weight = sharding.local(self.mask), sharding.local(self.parameter.detach())
        partial = self.count < self.mask.numel()
        self._integers = bits.integer_mask(own, weight) if partial else None
        self.mask_weight()

    def load(self, mask: Tensor) -> None:
        """Take another mask, with a count of its own."""
        sharding.local(self.mask).copy_(sharding.local(sharding.shard(mask, self.parameter)))
        self._recount()

    def replace(self, mask: Tensor) -> Tensor:
        """Take a new mask of the same count; dropped weights become zero, grown ones are it.

        Args:
            mask: the whole mask, equal in every process.

        Returns:
            Where the mask changed, of what this process holds.
        """
        new, own = sharding.local(sharding.shard(mask, self.parameter)), sharding.local(self.mask)
        changed = own ^ new
        own.copy_(new)
        if self._integers is not None:
            self._integers.copy_(new).neg_()
        if sharding.together():
            self.digest = bits.digest(mask)
        self.mask_weight()
        return changed

    def mask_weight(self) -> None:
        """Set the inactive weights to zero."""
        if self._integers is not None:
            bits.and_(sharding.local(self.parameter.detach()), self._integers)

    def mask_gradient(self) -> None:
        """Zero the gradient of inactive connections, so that clipping and momentum see none of it."""
        grad = self.parameter.grad
        if grad is not None and self._integers is not None:
            bits.and_(sharding.local(grad), self._integers)

    def has_strays(self) -> bool:
        """Whether an inactive weight that this process holds is not zero; reads back from the device."""
        nonzero = sharding.local(self.parameter.detach()) != 0
        return bool((nonzero > sharding.local(self.mask)).count_nonzero())

    def inactive(self) -> Tensor:
        """Where there is no connection, of what this process holds."""
        return ~sharding.local(self.mask)

    def is_current(self, parameter: nn.Parameter | None) -> bool:
        """Whether this is still the parameter that the layer was made for, as it was."""
        weight = None if parameter is None else sharding.local(parameter.detach())
        return (
            weight is not None
            and parameter is self.parameter
            and sharding.local(self.mask).device == weight.device
            and (self._integers is None or self._integers.element_size() == weight.element_size())
        )

    def masked(self, values: Tensor) -> Tensor:
        """A copy of values of the parameter's shape, sharded as it is, zero where there is no connection."""
        copy = values.detach().clone()
        own = sharding.local(copy)
        own.masked_fill_(self.inactive().to(own.device), 0)
        return copy
