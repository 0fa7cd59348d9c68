"""What a method is: a few declared facts and two scores. It never counts, chooses or changes anything."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_rigl.topology.parts import Part
from lightning_rigl.topology.schedules import UpdateSchedule


@dataclass(frozen=True)
class Connections:
    """One layer as a method sees it at an update.

    Args:
        weight: the layer's values, zero where inactive; read only.
        mask: bool, True = active; shape of ``weight``.
        grad: the dense gradient of this optimizer step: accumulated, averaged over ranks, unscaled, not
            clipped; float32 at least. None if the method declares that it needs none.
        generator: private randomness on the CPU, the same on every rank and in every resumed run.
    """

    weight: Tensor
    mask: Tensor
    grad: Tensor | None
    generator: torch.Generator

    def dense_grad(self) -> Tensor:
        """The dense gradient; RuntimeError if the method declared that it needs none."""
        if self.grad is None:
            raise RuntimeError("this method reads the dense gradient: declare gradient = 'at_updates'")
        return self.grad

    def random(self) -> Tensor:
        """Uniform random scores in [0, 1), the shape of ``weight``, drawn on the CPU for every device."""
        return torch.rand(self.weight.shape, generator=self.generator).to(self.weight.device)


class Method(Part):
    """A sparse training method: which connections are worth keeping, and which are worth growing.

    Facts (class attributes), with their defaults:
        gradient: when the dense gradient is read: ``never``, ``at_updates`` or ``every_step``.
        starts_dense: training starts with all connections active.
        scope: counts hold per ``layer`` or over the whole ``model``.
        latent: values of inactive connections are kept and trained.
        schedule: the method's own default schedule; None if it never updates.

    Example:
        A control that keeps the largest weights and grows at random is SET:

        >>> from lightning_rigl import Connections, Method
        >>> class MySET(Method):
        ...     def drop_score(self, layer: Connections):
        ...         return layer.weight.abs()
        ...     def grow_score(self, layer: Connections):
        ...         return layer.random()
        >>> Method.of("myset").gradient
        'never'
    """

    gradient: ClassVar[Literal["never", "at_updates", "every_step"]] = "never"
    starts_dense: ClassVar[bool] = False
    scope: ClassVar[Literal["layer", "model"]] = "layer"
    latent: ClassVar[bool] = False
    schedule: ClassVar[UpdateSchedule | None] = UpdateSchedule()

    @abstractmethod
    def drop_score(self, layer: Connections) -> Tensor:
        """How much each active connection is worth: the lowest are dropped. Shape of the layer's weight."""

    @abstractmethod
    def grow_score(self, layer: Connections) -> Tensor:
        """How promising each connection is: the highest outside the kept ones grow. Shape of the weight."""


def runnable(method: Method) -> Method:
    """The method, if this version can run it; ValueError if it declares a fact that has no engine yet."""
    facts = {
        "gradient='every_step'": method.gradient == "every_step",
        "starts_dense": method.starts_dense,
        "scope='model'": method.scope == "model",
        "latent": method.latent,
    }
    if missing := [fact for fact, declared in facts.items() if declared]:
        raise ValueError(
            f"method {type(method).__name__} declares {', '.join(missing)}, which this version does not run"
        )
    return method
