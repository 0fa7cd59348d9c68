"""The sparse parameters of a model: their masks, and the zeros that the masks mean."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.compute.linear import SparseProduct
from lightning_rigl.methods.base import Connections
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
        self.kept: Tensor | None = None  # a gradient that may be clipped before the update
        self.held_out: Tensor | None = None  # a gradient that only the choice of connections reads
        self.target = 0  # active connections that the distribution gives it
        self.notes: dict[str, Tensor] = {}  # what the method keeps of it
        self.product: SparseProduct | None = None  # computes with the weight, while that is sparse
        self._applied: bits.AppliedMask | None = None
        self.replace(sharding.full(self.mask))

    def replace(self, mask: Tensor) -> Tensor:
        """Take a mask, whole; returns where it changed, of what this process holds.

        Dropped weights become zero, grown ones are it.
        """
        new, own = sharding.local(sharding.shard(mask, self.parameter)), sharding.local(self.mask)
        changed = own ^ new
        own.copy_(new)
        self.count = int(mask.count_nonzero())
        if self.count == mask.numel():
            self._applied = None  # a full layer needs none
        elif self._applied is None:
            self._applied = bits.AppliedMask(own, sharding.local(self.parameter.detach()))
        else:
            self._applied.renew(own)
        self._digest = bits.digest(mask) if sharding.together() else None
        self.mask_weight()
        if self.product is not None:
            self.product.renew(self.mask)
        return changed

    def saved_notes(self) -> dict[str, Tensor]:
        """The method's notes as they are now."""
        return {key: note.detach().clone() for key, note in self.notes.items()}

    def take_notes(self, notes: Mapping[str, Tensor]) -> None:
        """Copies of what was saved."""
        self.notes = {key: note.to(self.parameter.device, copy=True) for key, note in notes.items()}

    def connections(self, seed: int, step: int, grad: Tensor | None = None) -> Connections:
        """The layer as a method sees it: whole, its values in at least 32 bits."""
        return Connections(
            _wide(sharding.full(self.parameter.detach())),
            sharding.full(self.mask),
            None if grad is None else _wide(sharding.full(grad)),
            private_generator(seed, self.name, step),
            self.target,
            self.notes,
        )

    @property
    def digest(self) -> int:
        """A number to be compared between processes; known, unless they have met since the mask was made."""
        if self._digest is None:
            self._digest = bits.digest(sharding.full(self.mask))
        return self._digest

    def mask_weight(self) -> None:
        """Set the inactive weights to zero."""
        if self._applied is not None:
            self._applied.zero(sharding.local(self.parameter.detach()))

    def mask_gradient(self) -> None:
        """Zero the gradient of inactive connections, so that clipping and momentum see none of it."""
        grad = self.parameter.grad
        if grad is None or self._applied is None or (self.product and self.product.wrote(grad)):
            return  # nothing there is inactive and not zero
        self._applied.zero(sharding.local(grad))

    @property
    def gradient(self) -> Tensor | None:
        """That of the step: the parameter's, or what was kept of it before it was clipped."""
        return self.parameter.grad if self.kept is None else self.kept

    @property
    def chooses(self) -> Tensor | None:
        """The gradient that chooses connections: of a held-out batch, or that of the step."""
        return self.gradient if self.held_out is None else self.held_out

    def keep_gradient(self) -> None:
        """Copy the gradient, should it be clipped before the update; one that is sparse cannot be."""
        grad = self.parameter.grad
        self.kept = None if grad is None or grad.is_sparse else grad.detach().clone()

    def forget_gradients(self) -> None:
        """The step is over: drop what was kept for it."""
        self.kept = self.held_out = None

    def restore_gradient(self) -> None:
        """Give back what was masked of a gradient that was kept, unless the gradient has changed since."""
        grad = self.parameter.grad
        if self.kept is not None and grad is not None and not grad.is_sparse:
            own, kept = sharding.local(grad), sharding.local(self.kept)
            if torch.equal(own, kept.masked_fill(self.inactive(), 0)):
                own.copy_(kept)

    def has_strays(self) -> bool:
        """Whether an inactive weight that this process holds is not zero; reads back from the device."""
        nonzero = sharding.local(self.parameter.detach()) != 0
        return bool((nonzero > sharding.local(self.mask).to(nonzero.device)).count_nonzero())

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
            and (self._applied is None or self._applied.fits(weight))
        )

    def masked(self, values: Tensor) -> Tensor:
        """A copy of values of the parameter's shape, sharded as it is, zero where there is no connection."""
        copy = values.detach().clone()
        own = sharding.local(copy)
        own.masked_fill_(self.inactive().to(own.device), 0)
        return copy


def private_generator(seed: int, name: str, step: int) -> torch.Generator:
    """Randomness of its own for one layer at one step: the same on every rank, device and resumed run."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.element_size() < 4 else values


class SparseLayers(dict[str, SparseLayer]):
    """Cleaned parameter name -> layer: the topology of one model.

    Args:
        parameters: of the model, by cleaned name.
        masks: of some of them, whole or sharded as the parameter is; they are taken over.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        super().__init__({name: SparseLayer(name, parameters[name], mask) for name, mask in masks.items()})
        self._by_parameter = {layer.parameter: layer for layer in self.values()}

    def of(self, optimizer: Optimizer) -> list[SparseLayer]:
        """The layers that the optimizer trains."""
        known = self._by_parameter
        return [known[p] for group in optimizer.param_groups for p in group["params"] if p in known]

    @property
    def density(self) -> float:
        """Active connections over all connections."""
        return sum(layer.count for layer in self.values()) / sum(
            layer.mask.numel() for layer in self.values()
        )

    def mask_weights(self) -> None:
        """Set the inactive weights to zero."""
        for layer in self.values():
            layer.mask_weight()

    def has_strays(self) -> bool:
        """Whether an inactive weight that this process holds is not zero."""
        return any(layer.has_strays() for layer in self.values())

    def is_current(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether these are still the parameters that the masks were made for, as they were."""
        return all(layer.is_current(parameters.get(name)) for name, layer in self.items())

    def check_agreement(self) -> None:
        """Raise RuntimeError if the processes of a distributed run have different masks."""
        if sharding.together():
            digests = {name: layer.digest for name, layer in self.items()}
            sharding.check_same(digests, next(iter(self.values())).mask.device)


def last_update(own: Iterable[SparseLayer], step: int) -> int:
    """The step of the last update of these layers; ``step``, so that none is due, if there is no layer."""
    return max([layer.last for layer in own], default=step)
