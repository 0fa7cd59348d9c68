"""Layers that compute sparsely for a while: an instance's class is exchanged, and put back."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.nn.functional import linear

from lightning_rigl.compute.linear import SparseProduct, product_of

_KEY = "_lightning_rigl_product"
_variants: WeakKeyDictionary[type[nn.Module], type[nn.Module]] = WeakKeyDictionary()
_owns: WeakKeyDictionary[type[nn.Module], type[nn.Module]] = WeakKeyDictionary()  # the other way round


class _Sparse:
    """Put before a linear layer's own class: the same module, with another product."""

    def __init_subclass__(cls) -> None:
        """Classes made here are nobody's: what a layer's own class asks of its subclasses is not for them."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Linear
        """As `torch.nn.Linear`."""
        if is_scripting():  # the compiler looks no further
            return linear(input, self.weight, self.bias)
        else:  # noqa: RET505
            return product_of(vars(self).get(_KEY), input, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the layer's own class, and are read without this package."""
        cls: Any = type(self)
        if cls not in _owns:  # somebody has put a class of theirs before it
            return super().__reduce_ex__(protocol)
        reduced: Any = plain_twin(self).__reduce_ex__(protocol)
        made, args, *state = reduced
        if made is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle refuses it for another class
            made, args = copyreg._reconstructor, (*args, object, None)  # type: ignore[attr-defined]
        return made, args, *state


def plain_twin(layer: Any) -> nn.Module:
    """A module of the layer's own class that shares all it has but the sparse product."""
    own: Any = _owns.get(type(layer), type(layer))
    twin: nn.Module = own.__new__(own)
    vars(twin).update({name: value for name, value in vars(layer).items() if name != _KEY})
    return twin


def able(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """Parameters whose layers are all linear ones with `torch.nn.Linear`'s own product, and these layers.

    An output projection inside attention is not one of them: attention never calls it.
    """
    inside = {
        id(m)
        for attention in model.modules()
        if isinstance(attention, nn.MultiheadAttention)
        for m in attention.modules()
    }
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)

    def fits(module: nn.Module, parameter: nn.Parameter) -> bool:
        return (
            isinstance(module, nn.Linear)
            and (type(module).forward is nn.Linear.forward or isinstance(module, _Sparse))
            and module.weight is parameter
            and id(module) not in inside
        )

    return {p: modules for p, modules in users.items() if all(fits(module, p) for module in modules)}


def on(layers: Mapping[nn.Module, SparseProduct]) -> None:
    """Let these linear layers compute with their sparse products."""
    for layer, product in layers.items():
        own: Any = _owns.get(type(layer), type(layer))
        if own not in _variants:
            names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
            _variants[own] = type(own.__name__, (_Sparse, own), names)
            _owns[_variants[own]] = own
        layer.__class__ = _variants[own]
        vars(layer)[_KEY] = product


def off(model: nn.Module) -> None:
    """Give all layers of a model back to their own classes.

    One whose class somebody else has changed since computes densely, and keeps that class.
    """
    for layer in model.modules():
        if vars(layer).pop(_KEY, None) is not None and type(layer) in _owns:
            layer.__class__ = _owns[type(layer)]
