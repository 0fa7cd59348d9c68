"""A copy of a model whose linear layers and convolutions of one pixel skip their zeros, for inference."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_rigl.compute import crossover
from lightning_rigl.compute.backends import native
from lightning_rigl.export.copies import inference_copy
from lightning_rigl.export.sparse_layers import SparseConv1x1, SparseLinear, SparseProduct
from lightning_rigl.export.sparse_report import SparseReport
from lightning_rigl.kernels import library

Backend = Literal["auto", "torch", "native"]

_DENSEST_CONV = {"native": 0.25, "torch": 0.05}  # torch's convolutions are better than its linear layers
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPORT = "_lightning_rigl_sparse"


def sparse(model: nn.Module, backend: Backend = "auto", min_sparsity: float | None = None) -> nn.Module:
    """A copy of a model in evaluation mode that skips the zeros of its weights.

    Layers that gain become a `SparseLinear` or a `SparseConv1x1`: linear layers, and convolutions with
    kernels of one pixel, one group, stride 1 and no padding. A zero is a weight that is zero: masks are not
    needed.
    Layers stay dense that are not float32 on the CPU, that share their weight, whose class has a forward pass
    of its own, or that attention reads without calling them; `sparse_report` says which and why.

    The sparse layers stay float32: after ``half()`` or ``double()`` they refuse to run, and under autocast
    they compute and return float32, where dense layers return bfloat16.

    The copy works under ``torch.compile`` and ``torch.export``, in copies and pickles (those need this
    package), and loads the ``state_dict`` of another copy made in the same way.

    Args:
        model: trained, its inactive weights exactly zero; it is not changed.
        backend: ``native`` kernels, ``torch``'s, or ``auto``: native where there are such kernels, else
            torch's, with a warning.
        min_sparsity: from 0 to 1: take the layers with at least this share of zeros, of any size; by default
            those that gain by `lightning_rigl.compute.crossover`.

    Raises:
        TypeError: no module.
        ValueError: the model cannot be copied; there is no such backend or share of zeros.
        RuntimeError: the backend cannot be had here.

    Example:
        >>> model = nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> with torch.no_grad():
        ...     model[0].weight[:, 100:] = 0
        >>> fast, x = sparse(model, "torch"), torch.randn(4, 1024)
        >>> fast
        Sequential(
          (0): SparseLinear(1024, 512, bias=True, density=0.0977, torch)
          (1): ReLU()
          (2): Linear(in_features=512, out_features=10, bias=True)
        )
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparse: expected a torch.nn.Module, got {type(model).__name__}")
    if min_sparsity is not None and not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity: a share of zeros from 0 to 1, or None, got {min_sparsity!r}")
    chosen, words = _backend(backend)
    if words:
        warnings.warn(f"export.sparse: {words}", stacklevel=2)
    twin = inference_copy(model)
    choice = _Choice(twin, chosen, min_sparsity)
    layers = {name: m for name, m in twin.named_modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))}
    reasons = {name: why for name, m in layers.items() if (why := choice.reason(m)) is not None}
    weights = {name: m.weight for name, m in layers.items() if not nn.parameter.is_lazy(m.weight)}
    report = SparseReport(
        {name: tuple(weight.shape) for name, weight in weights.items()},
        {name: _connections(weight) for name, weight in weights.items()},
        {name: "dense" if name in reasons else chosen for name in layers},
        reasons,
        words,
    )
    new = {id(layers[name]): _replacement(layers[name], chosen) for name in report.sparse}
    twin = new.get(id(twin), twin)
    _put(twin, new)
    vars(twin)[_REPORT] = report
    return twin.eval()


def sparse_report(model: nn.Module) -> SparseReport:
    """What `sparse` has done with each layer.

    Args:
        model: a model that it gave.

    Raises:
        ValueError: any other model.
    """
    report = vars(model).get(_REPORT)
    if not isinstance(report, SparseReport):
        raise ValueError(f"{type(model).__name__} does not come from lightning_rigl.export.sparse")
    return report


def _backend(asked: str) -> tuple[str, str]:
    """Who computes, and what is to be said of it."""
    if asked not in get_args(Backend):
        raise ValueError(f"backend: one of {', '.join(get_args(Backend))}, got {asked!r}")
    if asked != "torch" and native() is not None:
        return "native", ""
    if asked == "native":
        raise RuntimeError(
            f"the native kernels cannot be had here: {library.why_not()}; take backend='torch' or 'auto'"
        )
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "this build of torch has no MKL, which its sparse products need"
            + (f", and there are no native kernels: {library.why_not()}" if asked == "auto" else "")
        )
    said = f"the native kernels are not at hand, torch's are taken: {library.why_not()}"
    return "torch", said if asked == "auto" else ""


class _Choice:
    """Which layers of a model can skip their zeros, and gain by it."""

    def __init__(self, model: nn.Module, backend: str, min_sparsity: float | None) -> None:
        self._backend, self._min_sparsity = backend, min_sparsity
        modules = list(model.modules())
        self._users = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
        self._read = _inside(modules, nn.MultiheadAttention)
        nesting = [m for m in _of(modules, nn.TransformerEncoder) if m.use_nested_tensor]
        self._nested = _inside(nesting, nn.TransformerEncoderLayer)

    def reason(self, layer: nn.Module) -> str | None:
        """Why a layer stays dense; None if it does not."""
        return _unlike(layer) or self._bound(layer) or self._dear(layer)

    def _bound(self, layer: nn.Module) -> str | None:
        if id(layer) in self._read:
            return "read by an attention layer that does not call it"
        if id(layer) in self._nested:
            return (
                "its encoder makes nested tensors; set use_nested_tensor = False on the nn.TransformerEncoder"
            )
        if any(self._users[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            return "tied: other modules use its weight"
        return None

    def _dear(self, layer: nn.Module) -> str | None:
        weight: Any = layer.weight
        count, size = _connections(weight), weight.numel()
        if self._min_sparsity is not None:
            enough = size - count >= self._min_sparsity * size
            return None if enough else f"less sparse than {self._min_sparsity:g}"
        gains = crossover.gains(weight.shape[0], weight.shape[1], count, self._backend)
        if isinstance(layer, _CONVOLUTIONS):
            gains = gains and count <= _DENSEST_CONV[self._backend] * size
        return None if gains else "too dense or too small to gain"


def _unlike(layer: nn.Module) -> str | None:
    """What a layer has that a product with its weight has not."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.layout != torch.strided:
        return "no plain weight of its own"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"{weight.dtype} on {weight.device}, and sparse products are float32 on the CPU"
    if not weight.numel():
        return "empty"
    if type(layer).forward not in (nn.Linear.forward, *(c.forward for c in _CONVOLUTIONS)) or (
        "forward" in vars(layer)
    ):
        return "of a class with a forward pass of its own"
    if any(getattr(layer, name) for name in _HOOKS):
        return "watched by hooks"
    return _unlike_product(layer) if isinstance(layer, _CONVOLUTIONS) else None


def _unlike_product(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    own = next(c for c in _CONVOLUTIONS if isinstance(layer, c))
    if type(layer)._conv_forward is not own._conv_forward:
        return "of a class with a forward pass of its own"
    padded = layer.padding not in ("valid", "same") and any(layer.padding)
    if {*layer.kernel_size, *layer.stride, layer.groups} != {1} or padded:
        return "a convolution with a larger kernel, groups, strides or padding"
    return None


def _replacement(layer: Any, backend: str) -> SparseProduct:
    kind = SparseConv1x1 if isinstance(layer, _CONVOLUTIONS) else SparseLinear
    return kind(layer.weight, layer.bias, backend)


def _put(model: nn.Module, new: dict[int, SparseProduct]) -> None:
    """Replace layers, by their id, wherever they are."""
    for parent in list(model.modules()):
        mine = {name: new[id(m)] for name, m in parent._modules.items() if id(m) in new}
        parent._modules.update(mine)
        if mine and isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fused kernel would read the weights, not call the layers


def _connections(weight: Tensor) -> int:
    return 0 if weight.is_meta else int(weight.count_nonzero())


def _of(modules: list[nn.Module], kind: type[nn.Module]) -> list[Any]:
    return [m for m in modules if isinstance(m, kind)]


def _inside(modules: list[Any], kind: type[nn.Module]) -> set[int]:
    """The ids of all modules in those of a kind, in these modules."""
    return {
        id(m) for module in modules for found in _of(list(module.modules()), kind) for m in found.modules()
    }
