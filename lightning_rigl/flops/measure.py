"""A model, a table of costs or bare shapes -> what a plan needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_rigl.flops.costs import CostTable, LayerCost
from lightning_rigl.flops.meta import meta_copy, to_meta
from lightning_rigl.flops.tracer import Tracer
from lightning_rigl.model import layers
from lightning_rigl.topology.distributions import find


def measure(model: nn.Module, *example: Any, samples: int | None = None) -> CostTable:
    """What each parameter costs in a training step of this model, by one forward pass without values.

    The pass runs in training mode on a copy on the meta device: neither the model nor the random generators
    change, and the memory of weights and activations is not needed.

    Args:
        model: any module; a LightningModule is measured by its ``forward``.
        example: its inputs: tensors, shapes (of float32 tensors) or containers of tensors.
        samples: how many samples they hold; None: the first dimension of the first tensor.

    Raises:
        ValueError: the model does not run on the example, or not without values; the message names the way
            out.

    Example:
        >>> net = nn.Sequential(nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 4))
        >>> [(layer.name, layer.forward) for layer in measure(net, (32, 100)).layers]
        [('0.weight', 2000), ('2.weight', 80)]
    """
    inputs = [_to_meta(each) for each in example]
    samples = _samples(inputs) if samples is None else samples
    try:
        twin = meta_copy(model).to("meta").train()
        tracer = Tracer(layers.named_parameters(twin), twin.buffers())
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("meta"), tracer:
            outputs = twin(*inputs)
            _repeat_checkpoints(outputs)
    except Exception as error:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in _tensors(inputs))
        raise ValueError(
            f"{type(model).__name__} cannot be measured with {given or 'no input'}, in training mode and "
            f"without values (on the meta device): {type(error).__name__}: {error}. Check the number, shape "
            "and dtype of the inputs (a batch norm may need two samples); if the forward pass reads values, "
            "run it once inside a Tracer and give the CostTable that it makes in place of the model"
        ) from error
    return tracer.table(samples).per_sample()


def _repeat_checkpoints(outputs: Any) -> None:
    """A backward pass, for what activation checkpointing repeats in it; without it that is not counted."""
    with suppress(Exception):
        sum(t.sum() for t in _tensors(outputs) if t.requires_grad).backward()  # type: ignore[union-attr]


def cost_table(shapes: Mapping[str, tuple[Sequence[int], int]]) -> CostTable:
    """The costs of layers known by their shapes only.

    Args:
        shapes: layer name -> (shape of its weight as PyTorch stores it, output positions per sample): 1 for a
            linear layer, height x width of the output for a convolution. The first layer needs no gradient of
            its input.

    Raises:
        ValueError: an entry of another form.

    Example:
        >>> table = cost_table({"conv": ((16, 3, 3, 3), 1024), "fc": ((10, 16), 1)})
        >>> [(layer.name, layer.forward, layer.outputs, layer.input_gradient) for layer in table.layers]
        [('conv', 884736, 16384, 0), ('fc', 320, 10, 320)]
    """
    rows: list[LayerCost] = []
    for name, entry in shapes.items():
        if not _is_layer(entry):
            raise ValueError(
                f"{name}: expected (shape of the weight, output positions), as ((16, 3, 3, 3), 1024), "
                f"got {entry!r}"
            )
        shape, positions = tuple(entry[0]), entry[1]
        flops = 2 * math.prod(shape) * positions
        rows.append(LayerCost(name, shape, flops, shape[0] * positions, flops if rows else 0, flops))
    return CostTable(tuple(rows))


@dataclass(frozen=True)
class Measurement:
    """What is known of a model.

    Args:
        table: what its layers cost.
        shapes: shapes of the layers that are made sparse, by name.
        others: number of parameters outside the table and ``shapes`` (biases, norms, lookups); None: unknown.
        batch_size: samples per optimizer step.
    """

    table: CostTable
    shapes: dict[str, tuple[int, ...]]
    others: int | None
    batch_size: int

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights, by name: those with a cost and those that are made sparse."""
        return {**{layer.name: layer.shape for layer in self.table.layers}, **self.shapes}

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers to be made sparse that took part in no product."""
        seen = {layer.name for layer in self.table.layers}
        return tuple(name for name in self.shapes if name not in seen)


Source: TypeAlias = nn.Module | CostTable | Mapping[str, tuple[Sequence[int], int]] | Measurement


def measurement(
    source: Source,
    *example: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> Measurement:
    """Measure a model, or take what is known.

    Args:
        source: a module, a `CostTable`, bare shapes as for `cost_table`, or what this function returned.
        example: inputs of a module, as for `measure`; none otherwise.
        include: regular expressions of the layers to make sparse, in place of the default: of a module that
            of `layers.select`, else all weights of two or more dimensions.
        exclude: regular expressions of layers that stay dense.
        batch_size: samples per optimizer step; None: the first dimension of the example, or 1.

    Raises:
        ValueError: a module without example, or an example without module; a batch size below 1; else as
            `measure` and `layers.select`.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size: the samples per optimizer step, at least 1, got {batch_size!r}")
    if not isinstance(source, (nn.Module, Measurement, CostTable, Mapping)):
        raise ValueError(
            f"expected a torch.nn.Module, a CostTable or bare shapes, layer name -> (shape, positions), got "
            f"{type(source).__name__}"
        )
    if isinstance(source, nn.Module):
        if not example:
            raise ValueError(f"{type(source).__name__}: give an input, or its shape, as (1, 3, 224, 224)")
        return _of_model(source, example, layers.select(source, include, exclude), batch_size)
    if isinstance(source, Measurement):
        if example or include or exclude:
            raise ValueError(
                "a Measurement has its layers: give include, exclude and the example to measurement"
            )
        return replace(source, batch_size=batch_size or source.batch_size)
    if example:
        raise ValueError("an example is for a model; of a table or of bare shapes give batch_size=...")
    table = source.per_sample() if isinstance(source, CostTable) else cost_table(source)
    return Measurement(table, _chosen(table, include, exclude), None, batch_size or 1)


def _of_model(
    model: nn.Module, example: Sequence[Any], chosen: Mapping[str, nn.Parameter], batch_size: int | None
) -> Measurement:
    samples = _samples([_to_meta(each) for each in example])
    table = measure(model, *example, samples=samples)
    shapes = {name: tuple(parameter.shape) for name, parameter in chosen.items()}
    seen = shapes.keys() | {layer.name for layer in table.layers}
    parameters = layers.named_parameters(model).items()
    others = sum(parameter.numel() for name, parameter in parameters if name not in seen)
    return Measurement(table, shapes, others, batch_size or samples)


def _chosen(
    table: CostTable, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, tuple[int, ...]]:
    shapes = {layer.name: layer.shape for layer in table.layers if len(layer.shape) > 1}
    names = list(shapes)
    wanted = names if include is None else [n for p in include for n in find(p, names, "include")]
    unwanted = {n for p in exclude or () for n in find(p, names, "exclude")}
    chosen = {n: shape for n, shape in shapes.items() if n in wanted and n not in unwanted}
    if not chosen:
        raise ValueError(
            f"of {len(names)} weights of two or more dimensions none is left; check include and exclude"
        )
    return chosen


def _is_layer(entry: object) -> TypeGuard[tuple[Sequence[int], int]]:
    return isinstance(entry, Sequence) and len(entry) == 2 and _is_shape(entry[0]) and _is_shape((entry[1],))


def _is_shape(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and all(type(n) is int and n > 0 for n in value) and len(value) > 0


def _to_meta(each: Any) -> Any:
    if _is_shape(each):
        return torch.empty(tuple(each), device="meta")
    return tree_map_only(Tensor, to_meta, each)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def _samples(inputs: list[Any]) -> int:
    first = next(_tensors(inputs), None)
    if first is None or first.dim() == 0 or first.shape[0] == 0:
        raise ValueError(
            "the example holds no batch: give a tensor or a shape whose first dimension is the batch"
        )
    return first.shape[0]
