"""How a sparse model computes while it is trained: densely, or by products that skip its zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_rigl.compute import crossover, switch
from lightning_rigl.compute.backends import native
from lightning_rigl.compute.linear import SparseProduct
from lightning_rigl.compute.optimizers import ActiveStep
from lightning_rigl.kernels import library
from lightning_rigl.model import sharding
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.growth import Growth

Compute = Literal["dense", "auto", "torch", "native"]


def check(compute: object) -> None:
    """Raise ValueError if there is no such way to compute."""
    if compute not in get_args(Compute):
        raise ValueError(f"compute: one of {', '.join(get_args(Compute))}, got {compute!r}")


class SparseCompute:
    """The products of a model's layers, as long as it is trained.

    Args:
        model: whose linear layers may compute sparsely.
        layers: of it, by name.
        compute: on what; ``auto`` is the native kernels, or torch's where these cannot be had.

    Attributes:
        asked: whether anything but ``dense`` was asked for.
        words: what a user should know of it; empty if nothing.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SparseLayer], compute: Compute) -> None:
        self._model, self._layers = model, layers
        self.asked = compute != "dense"
        self.words: list[str] = []
        self._compute, self._backend = compute, self._choice(compute)
        self._rules = crossover.SAFE if compute == "auto" else crossover.ASKED

    @property
    def cells(self) -> dict[str, str]:
        """Name of each layer -> how it computes, and from how many rows of input on, for a table."""
        cells = dict.fromkeys(self._layers, "dense")
        for layer in self._able():
            rows = crossover.least_rows(layer.parameter.numel(), layer.count, self._rules[self._backend])
            if rows is not None:
                cells[layer.name] = self._backend + (f" from {rows} rows" if rows > 1 else "")
        return cells

    def _choice(self, compute: Compute) -> str:
        if compute in ("auto", "native"):
            if native() is not None:
                return "native"
            self.words.append(
                f"compute={compute!r}: the native kernels are not at hand, torch's are taken; "
                f"{library.why_not()}"
            )
        return "dense" if compute == "dense" else "torch"

    def _able(self) -> dict[SparseLayer, list[nn.Module]]:
        """Layers that may compute sparsely, by what does not change in a run, and their modules."""
        if self._backend == "dense":
            return {}
        modules, able = switch.able(self._model), {}
        for layer in self._layers.values():
            weight = layer.parameter
            plain = not sharding.is_sharded(weight) and weight.is_contiguous()
            plain = plain and weight.device.type == "cpu" and weight.dtype == torch.float32
            if plain and weight in modules:
                able[layer] = modules[weight]
        return able

    def begin(self) -> None:
        """Let the layers compute sparsely; the model is trained from here on."""
        products: dict[nn.Module, SparseProduct] = {}
        for layer, modules in self._able().items():
            rule = self._rules[self._backend]
            layer.product = layer.product or SparseProduct(layer.parameter, layer.mask, self._backend, rule)
            products.update(dict.fromkeys(modules, layer.product))
        switch.on(products)
        if (why := self._nowhere()) and why not in self.words:
            self.words.append(why)

    def _nowhere(self) -> str | None:
        """What to say if a backend was asked for by name and no layer can use it; None otherwise."""
        if self._compute not in ("native", "torch"):
            return None
        able = list(self._able())
        rule, why = self._rules[self._backend], "all sparse layers are too small or too dense to gain"
        if not able:
            why = "no sparse layer is a plain torch.nn.Linear with a float32 weight on the CPU"
        counts = [(layer.parameter.numel(), min(layer.count, layer.target or layer.count)) for layer in able]
        if any(crossover.least_rows(*count, rule) is not None for count in counts):
            return None
        return f"compute={self._compute!r}: all products are dense: {why} (docs/speed.md)"

    def idle(self) -> str | None:
        """After a training step: what to say if layers that could compute sparsely did not; else None."""
        if self._compute in ("auto", "dense"):
            return None
        products = [layer.product for layer in self._layers.values() if layer.product is not None]
        if any(product.used for product in products) or not any(product.missed for product in products):
            return None
        return (
            f"compute={self._compute!r}: no layer has computed sparsely so far: the forward pass runs under "
            "torch.autocast, with inputs that are not float32, or with fewer rows than summary() names"
        )

    def end(self) -> None:
        """Give the layers back as they were; gradients that are sparse become dense."""
        switch.off(self._model)
        for layer in self._layers.values():
            grad = layer.parameter.grad
            if layer.product is not None and grad is not None and grad.is_sparse:
                layer.parameter.grad = grad.to_dense()
            layer.product = None


def expect(own: Iterable[SparseLayer], dense: bool) -> None:
    """Whether the next backward passes are to give the gradient of inactive connections, too."""
    for layer in own:
        if layer.product is not None:
            layer.product.dense_gradient = dense


def attach(optimizer: Optimizer, own: Iterable[SparseLayer], growth: Growth) -> None:
    """Let an optimizer that can do it step active connections only.

    Raises:
        ValueError: new connections are to begin with a momentum, which is dense.
    """
    if isinstance(optimizer, ActiveStep):
        if growth.momentum:
            raise ValueError(
                f"growth: momentum={growth.momentum} is given to a dense state, and "
                f"{type(optimizer).__name__} has none; take momentum=0, or the optimizer of torch"
            )
        optimizer.attach({x.parameter: x.product for x in own if x.product is not None})


def is_partial(own: Iterable[SparseLayer]) -> bool:
    """Whether a backward pass since the last step has left out the gradient of inactive connections."""
    return any(layer.product is not None and layer.product.partial for layer in own)


def stepped(own: Iterable[SparseLayer]) -> None:
    """An optimizer's step begins: the gradients it has are used up."""
    for layer in own:
        if layer.product is not None:
            layer.product.partial = False
