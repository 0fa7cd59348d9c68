"""The measured cost of a model: a row for each parameter that takes part in a product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Convention = Literal["2mac", "official"]
# The fields that grow with the number of samples.
OF_A_LAYER = "forward", "outputs", "input_gradient", "weight_gradient", "recompute", "no_gradient"
OF_NO_LAYER = "other", "other_gradient", "other_recompute", "other_no_gradient"


@dataclass(frozen=True)
class LayerCost:
    """What the products of one parameter, or of a slice of one, cost per sample.

    Args:
        name: the cleaned parameter name.
        shape: the parameter's shape.
        forward: FLOPs of the dense forward pass, two per multiply-add.
        outputs: elements of the layer's output.
        input_gradient: FLOPs of the gradients of the inputs that autograd really computes: none for the first
            layer of a model.
        weight_gradient: FLOPs of the weight's gradient; none for a frozen weight.
        recompute: FLOPs of forward products that activation checkpointing repeats.
        no_gradient: FLOPs of forward products with gradients disabled: a teacher, a generator's samples.
        start: first element of the slice, in the flattened parameter.
        stop: the element after its last; None for the whole parameter.
        partner: key of the other factor, where both are parameters (``B @ A`` of LoRA).
        partner_numel: its size.
        filled: whether the products have an operand without zeros, whatever is active: a sum of parameters.
    """

    name: str
    shape: tuple[int, ...]
    forward: int
    outputs: int
    input_gradient: int = 0
    weight_gradient: int = 0
    recompute: int = 0
    no_gradient: int = 0
    start: int = 0
    stop: int | None = None
    partner: str = ""
    partner_numel: int = 1
    filled: bool = False

    @property
    def numel(self) -> int:
        """Connections of the dense layer, or of the slice."""
        return (math.prod(self.shape) if self.stop is None else self.stop) - self.start

    @property
    def key(self) -> str:
        """The name, and which elements if not all: ``attn.in_proj_weight[0:4096]``."""
        return self.name if self.stop is None else f"{self.name}[{self.start}:{self.stop}]"

    def active(self, counts: Mapping[str, int]) -> int:
        """Active connections: as counted for the slice, else its share of those of the parameter."""
        if self.filled:
            return self.numel
        if self.key in counts:
            return counts[self.key]
        if self.name in counts:
            return counts[self.name] * self.numel // max(math.prod(self.shape), 1)
        return self.numel

    def scaled(self, flops: int, counts: Mapping[str, int]) -> int:
        """FLOPs of a dense product at these counts: flops * active / numel, rounded down, for each factor.

        Raises:
            ValueError: a count outside [0, numel].

        Example:
            >>> layer = LayerCost("conv.weight", (16, 3, 3, 3), forward=884736, outputs=16384)
            >>> layer.scaled(layer.forward, {}), layer.scaled(layer.forward, {"conv.weight": 43})
            (884736, 88064)
        """
        active = self.active(counts)
        if not 0 <= active <= self.numel:
            raise ValueError(f"{self.key}: {active} active of {self.numel} connections")
        flops = flops * active // max(self.numel, 1)
        return flops * counts.get(self.partner, self.partner_numel) // max(self.partner_numel, 1)

    def forward_flops(self, counts: Mapping[str, int], convention: Convention = "2mac") -> int:
        """FLOPs per sample and forward pass; ``official`` adds one per output element, whatever is active."""
        return self.scaled(self.forward, counts) + (self.outputs if convention == "official" else 0)


@dataclass(frozen=True)
class CostTable:
    """The measured cost of one model.

    Args:
        layers: one entry per parameter, or slice of one, that takes part in a product.
        other: FLOPs of products without a parameter, such as attention scores; never scaled.
        unknown: operators that read a weight without being a product, as ``"aten.mul (layer.weight)"``.
        other_gradient: FLOPs of the gradients of products without a parameter.
        other_recompute: FLOPs of such products that activation checkpointing repeats.
        other_no_gradient: FLOPs of such products with gradients disabled.
        samples: how many samples cost this together: 1, unless a cost is not a whole number per sample.
    """

    layers: tuple[LayerCost, ...]
    other: int = 0
    unknown: tuple[str, ...] = ()
    other_gradient: int = 0
    other_recompute: int = 0
    other_no_gradient: int = 0
    samples: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every cost is a whole number per sample."""
        of_layers = (getattr(layer, field) for layer in self.layers for field in OF_A_LAYER)
        values = (*of_layers, *(getattr(self, field) for field in OF_NO_LAYER))
        return all(value % self.samples == 0 for value in values)

    def per_sample(self) -> CostTable:
        """The costs of one sample, each rounded to the nearest."""

        def shares(of: LayerCost | CostTable, fields: tuple[str, ...]) -> dict[str, Any]:
            return {field: (getattr(of, field) + self.samples // 2) // self.samples for field in fields}

        layers = tuple(replace(layer, **shares(layer, OF_A_LAYER)) for layer in self.layers)
        return replace(self, layers=layers, samples=1, **shares(self, OF_NO_LAYER))

    def state_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings and ints, so that a checkpoint loads with ``weights_only=True``."""
        layers = [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers]
        return {**asdict(self), "layers": layers, "unknown": list(self.unknown)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CostTable:
        """The table whose `state_dict` this is."""
        layers = tuple(LayerCost(**{**row, "shape": tuple(row["shape"])}) for row in state["layers"])
        return cls(**{**state, "layers": layers, "unknown": tuple(state["unknown"])})


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
