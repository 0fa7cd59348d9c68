"""What a forward pass, a training step and a whole run cost, from a table of layer costs and active counts.

Everything is an exact Python integer. A FLOP is one multiply or one add; biases, norms, activations, pooling
and the loss are not counted (appendix H of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Convention = Literal["2mac", "official"]


@dataclass(frozen=True)
class LayerCost:
    """What the products of one parameter cost per sample and forward pass.

    Args:
        name: the cleaned parameter name.
        shape: the parameter's shape.
        forward: FLOPs of the dense layer, two per multiply-add.
        outputs: elements of the layer's output.
    """

    name: str
    shape: tuple[int, ...]
    forward: int
    outputs: int

    @property
    def numel(self) -> int:
        """Connections of the dense layer."""
        return math.prod(self.shape)

    def flops(self, active: int, convention: Convention = "2mac") -> int:
        """FLOPs per sample and forward pass with ``active`` connections: f = forward * active / numel.

        Args:
            active: number of active connections, in [0, numel].
            convention: ``official`` adds one FLOP per output element, whatever is active.

        Raises:
            ValueError: ``active`` is outside its range.

        Example:
            >>> layer = LayerCost("conv.weight", (16, 3, 3, 3), forward=884736, outputs=16384)
            >>> layer.flops(432), layer.flops(43), layer.flops(43, "official")
            (884736, 88064, 104448)
        """
        if not 0 <= active <= self.numel:
            raise ValueError(f"{self.name}: {active} active of {self.numel} connections")
        extra = self.outputs if convention == "official" else 0
        return self.forward * active // max(self.numel, 1) + extra


@dataclass(frozen=True)
class CostTable:
    """The measured cost of one model.

    Args:
        layers: one entry per parameter that takes part in a product, in the order of first use.
        other: FLOPs per sample of products without a parameter, such as attention scores; never scaled.
        unknown: operators that read a weight without being a product, as ``"aten.mul (layer.weight)"``.
    """

    layers: tuple[LayerCost, ...]
    other: int = 0
    unknown: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings and ints, so that a checkpoint loads with ``weights_only=True``."""
        layers = [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers]
        return {"layers": layers, "other": self.other, "unknown": list(self.unknown)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CostTable:
        """The table whose `state_dict` this is."""
        layers = tuple(LayerCost(**{**row, "shape": tuple(row["shape"])}) for row in state["layers"])
        return cls(layers, state["other"], tuple(state["unknown"]))


def check_convention(name: str) -> None:
    """Raise a ValueError that lists the known conventions if ``name`` is not one of them.

    Example:
        >>> check_convention("macs")
        Traceback (most recent call last):
        ...
        ValueError: convention: unknown name 'macs'; the known ones are 2mac, official
    """
    known = get_args(Convention)
    if name not in known:
        raise ValueError(f"convention: unknown name {name!r}; the known ones are {', '.join(known)}")


def forward_cost(
    table: CostTable, counts: Mapping[str, int] | None = None, convention: Convention = "2mac"
) -> int:
    """FLOPs of one forward pass per sample.

    Args:
        table: the measured cost of the model.
        counts: active connections by parameter name; a parameter that is not named is dense.
        convention: ``2mac`` counts two FLOPs per multiply-add; ``official`` adds one FLOP per output element
            of each layer, as the paper's own counter does.

    Raises:
        ValueError: a count outside [0, numel].

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> table = CostTable((LayerCost("fc.weight", (10, 100), forward=2000, outputs=10),), other=64)
        >>> forward_cost(table), forward_cost(table, {"fc.weight": 50}, "official")
        (2064, 174)
    """
    active = counts or {}
    return table.other + sum(
        layer.flops(active.get(layer.name, layer.numel), convention) for layer in table.layers
    )


def step_cost(forward: int, forward_dense: int, dense_gradient: bool) -> int:
    """FLOPs of one training step per sample: 3 f_S, or 2 f_S + f_D if the gradient of every weight is needed.

    The backward pass costs two forward passes: one for the gradients of the activations, one for those of
    the weights.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.
        forward_dense: f_D, the same of the dense model.
        dense_gradient: whether this step computes the gradient of inactive connections too.

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> step_cost(53242, 532400, dense_gradient=False), step_cost(53242, 532400, dense_gradient=True)
        (159726, 638884)
    """
    return 2 * forward + (forward_dense if dense_gradient else forward)


@dataclass(frozen=True)
class RunCost:
    """What training has cost so far; each step gives the next value.

    Args:
        train: FLOPs of all samples so far.
        train_dense: what the dense model would have cost for them, 3 f_D each.
        pending: samples of the accumulation window that is still open.

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134, app. H; counted by the real schedule instead of the mean
        (3 f_S T + 2 f_S + f_D) / (T + 1).

    Example:
        Two micro-batches of 8 samples, then a topology update that reads the dense gradient of both:

        >>> run = RunCost().after(8, 100, 1000, gradient="at_updates", updated=False, stepped=False)
        >>> run
        RunCost(train=2400, train_dense=24000, pending=8)
        >>> run.after(8, 100, 1000, gradient="at_updates", updated=True, stepped=True)
        RunCost(train=19200, train_dense=48000, pending=0)
    """

    train: int = 0
    train_dense: int = 0
    pending: int = 0

    def after(
        self,
        samples: int,
        forward: int,
        forward_dense: int,
        *,
        gradient: Literal["never", "at_updates", "every_step"] = "never",
        updated: bool = False,
        stepped: bool = True,
    ) -> RunCost:
        """The cost after one more batch.

        Args:
            samples: samples in the batch.
            forward: f_S during the batch, FLOPs per sample.
            forward_dense: f_D.
            gradient: when the method reads the gradient of inactive connections.
            updated: whether the batch ended with a topology update.
            stepped: whether it ended with an optimizer step, or an update in its place.
        """
        pending = self.pending + samples
        train = self.train + samples * step_cost(forward, forward_dense, gradient == "every_step")
        if updated and gradient == "at_updates":
            train += pending * (forward_dense - forward)  # the whole window was booked at 3 f_S
        dense = self.train_dense + samples * step_cost(forward_dense, forward_dense, True)
        return RunCost(train, dense, 0 if stepped else pending)
