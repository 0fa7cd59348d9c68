"""What a method is: a few declared facts and some questions. It never counts, chooses or changes masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_rigl.topology.overall import drops
from lightning_rigl.topology.parts import Part
from lightning_rigl.topology.schedules import UpdateSchedule


@dataclass(frozen=True)
class Connections:
    """One layer as a method sees it.

    Args:
        weight: the layer's values, zero where inactive; read only.
        mask: bool, True = active; shape of ``weight``.
        grad: the dense gradient of this optimizer step: accumulated, averaged over ranks, unscaled, not
            clipped; float32 at least. None if the method declares that it needs none.
        generator: private randomness on the CPU, the same on every rank and in every resumed run.
        target: active connections that the distribution gives the layer.
        notes: tensors that the method keeps of the layer; they change in place, are saved and restored.
    """

    weight: Tensor
    mask: Tensor
    grad: Tensor | None
    generator: torch.Generator
    target: int = 0
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def active(self) -> int:
        """Active connections."""
        return int(self.mask.count_nonzero())

    def dense_grad(self) -> Tensor:
        """The dense gradient; RuntimeError if the method declared that it needs none."""
        if self.grad is None:
            raise RuntimeError("this method reads the dense gradient: declare gradient = 'at_updates'")
        return self.grad

    def random(self) -> Tensor:
        """Uniform random scores in [0, 1), the shape of ``weight``, drawn on the CPU for every device."""
        return torch.rand(self.weight.shape, generator=self.generator).to(self.weight.device)


@dataclass(frozen=True)
class Moment:
    """When a method is asked, and how much it may change.

    Args:
        step: optimizer steps already done.
        fraction: the drop fraction now, in [0, 1].
        progress: 0 at the schedule's first update, 1 at its last.
        rate: the learning rate of the optimizer's first sparse layer, in `settle` of the layer; nan if none.
        due: whether the schedule asks for an update.
        numbers: what the method keeps of the optimizer's layers; it changes in place, is saved and restored.
    """

    step: int
    fraction: float = 0.0
    progress: float = 1.0
    rate: float = 0.0
    due: bool = True
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """The model before its first step, for methods that score all connections then.

    Args:
        model: a copy of the model; it may be changed.
        loss: runs ``model`` on the first batch and returns its loss, with a graph.
        forward: runs ``model`` forward on a tensor.
        example: the first floating tensor of the first batch; None if there is none.
        parameters: cleaned name -> the sparse parameters of ``model``.
        targets: cleaned name -> active connections that the distribution gives each.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    forward: Callable[[Tensor], Tensor]
    example: Tensor | None
    parameters: dict[str, nn.Parameter]
    targets: dict[str, int]


class Method(Part):
    """A sparse training method: which connections are worth keeping, and which are worth growing.

    Facts (class attributes), with their defaults:
        gradient: when the dense gradient is read: ``never``, ``at_updates`` or ``every_step``.
        starts_dense: training starts with all connections active.
        scope: `turnover` sees one ``layer`` at a time, or the whole ``model``.
        latent: what is trained is a variable of its own, from which mask and weight follow at each step.
        schedule: the method's own default schedule; None if it never updates.

    Most methods are two scores. The other questions have an answer that most methods keep.

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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if problem := next(_problems(cls), None):
            raise TypeError(f"method {cls.__name__}: {problem}")

    @property
    def grows(self) -> bool:
        """Whether updates make new connections: not of a method that has none, starts dense or is latent.

        One that starts dense and grows nevertheless says ``grows = True``.
        """
        return self.schedule is not None and not self.starts_dense and not self.latent

    @property
    def prunes_along(self) -> bool:
        """Whether it goes from dense to its target in several updates: those that do it once know when."""
        return self.starts_dense and self.schedule is not None and not self.schedule.in_steps

    @abstractmethod
    def drop_score(self, layer: Connections) -> Tensor:
        """How much each active connection is worth: the lowest are dropped. Shape of the layer's weight."""

    @abstractmethod
    def grow_score(self, layer: Connections) -> Tensor:
        """How promising each connection is: the highest outside the kept ones grow. Shape of the weight."""

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """How many connections each layer drops and grows at an update; the drop fraction of each, if equal.

        A layer that drops and grows nothing keeps its mask, as one whose connections are all active does.
        """
        active = [0 if layer.mask.all() else layer.active for layer in layers]
        return [(int(moment.fraction * count),) * 2 for count in active]

    def planned(self, size: int, target: int, progress: float) -> int:
        """Of a method that starts dense: a layer's connections after the update at this progress."""
        return target

    def look(self, probe: Probe) -> dict[str, Tensor]:
        """Scores of all connections before the first step, by name: they become ``notes["score"]``."""
        raise NotImplementedError

    def observe(self, layer: Connections, moment: Moment) -> None:
        """Look at a layer before each optimizer step, and keep what is needed later in its notes."""
        raise NotImplementedError

    def disturb(self, layer: Connections) -> Tensor:
        """Factors of the weights in the next training step, such as 0 for a connection that takes no part."""
        raise NotImplementedError

    def settle(self, layer: Connections, moment: Moment) -> Tensor:
        """The values after each optimizer step, if the method moves them too."""
        raise NotImplementedError

    def begin(self, layer: Connections) -> Tensor:
        """What a latent method trains at first: the weight."""
        return layer.weight.clone()

    def pull(self, layer: Connections, variable: Tensor) -> Tensor:
        """The gradient of a latent method's variable: that of the weight, straight through."""
        return layer.dense_grad()

    def project(
        self, layers: Sequence[Connections], variables: Sequence[Tensor], moment: Moment
    ) -> list[tuple[Tensor, Tensor]]:
        """Mask and values that follow from a latent method's variables, after each step."""
        raise NotImplementedError

    def has(self, question: str) -> bool:
        """Whether the method answers one of the questions above that most methods leave alone."""
        return getattr(type(self), question) is not getattr(Method, question)


def _problems(cls: type[Method]) -> Iterator[str]:
    """What is wrong with the facts that a method declares; a property says them later."""
    gradients, scopes = ("never", "at_updates", "every_step"), ("layer", "model")
    for fact, known in (("gradient", gradients), ("scope", scopes)):
        told = getattr(cls, fact)
        if not isinstance(told, property) and told not in known:
            yield f"{fact} is one of {', '.join(known)}, got {told!r}"
    schedule: object = cls.schedule
    if not isinstance(schedule, (UpdateSchedule, property, type(None))):
        yield f"schedule is an UpdateSchedule or None, got {schedule!r}"
    if cls.latent is True and cls.project is Method.project:
        yield "latent = True asks for project, which says what mask and weight follow"
    if cls.starts_dense is True and cls.latent is False and cls.turnover is Method.turnover:
        yield "starts_dense = True asks for turnover, which says when and how many connections are dropped"


class ScoredOnce(Method):
    """A method that looks once, and keeps the highest scores of all layers together in place of step 0."""

    starts_dense = True
    scope = "model"
    # Once, at the first of ten steps whose gradients are finite: a loss scaler may need some to settle.
    schedule = UpdateSchedule(every=10, drop_fraction=0.0, begin=0, end=10)

    @abstractmethod
    def look(self, probe: Probe) -> dict[str, Tensor]:
        """Scores of all connections before the first step, by name."""

    def turnover(self, layers: Sequence[Connections], moment: Moment) -> list[tuple[int, int]]:
        """Drop down to the count of all layers together; grow nothing."""
        target = sum(layer.target for layer in layers)
        if sum(layer.active for layer in layers) <= target:
            return [(0, 0)] * len(layers)
        lost = drops([self.drop_score(x) for x in layers], [x.mask for x in layers], target)
        return [(each, 0) for each in lost]

    def drop_score(self, layer: Connections) -> Tensor:
        """What the first look has found."""
        if "score" not in layer.notes:
            name = type(self).__name__
            raise RuntimeError(f"{name} scores the connections first: call sparsifier.look() before any step")
        return layer.notes["score"]

    def grow_score(self, layer: Connections) -> Tensor:
        """The mask itself; nothing grows."""
        return layer.mask.float()
