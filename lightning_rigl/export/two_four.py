"""Linear layers that are 2:4 sparse, on the sparse tensor cores of NVIDIA's GPUs."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# multiples of rows and columns that both kernel libraries of torch take, cuSPARSELt and CUTLASS
SHAPES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
_CAPABILITY = (8, 0)  # Ampere is the first with sparse tensor cores


def semi_structured(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """A copy of a model whose 2:4 sparse linear weights are torch's semi-structured tensors, for inference.

    2:4 means that of each four consecutive inputs of an output at most two have a non-zero weight. The GPU
    skips the other two; it can skip no other zeros, and no other device has the instruction. Whether that is
    faster depends on the shapes: measure it.

    Args:
        model: a model on a CUDA device of compute capability 8.0 or more, in float16 or bfloat16. It stays
            as it is.
        names: the linear modules to convert, each of which must fit; by default all that fit, the others stay
            dense. Projections inside ``nn.MultiheadAttention`` stay dense, it reads their weights itself.

    Raises:
        ValueError: the model is not on such a device; a named layer is no linear layer, is not 2:4 sparse or
            has an unsuitable dtype or shape; no layer fits.

    Reference:
        Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021, arXiv:2104.08378.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    asked = linear if names is None else list(names)
    for name in asked:
        if name not in linear:
            raise ValueError(f"{name}: no linear layer of the model, which has {', '.join(linear) or 'none'}")
    reasons = {name: reason(modules[name]) for name in asked}
    wrong = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if names is not None and wrong:
        raise ValueError(f"semi_structured cannot convert {'; '.join(wrong)}; leave it out of names")
    if len(wrong) == len(reasons):
        said = "; ".join(wrong[:5]) or "the model has no linear layer"
        raise ValueError(f"semi_structured finds no layer that it can convert: {said}")
    new = copy.deepcopy(model)
    for name, why in reasons.items():
        if why is None:
            layer = new.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return new


def is_two_four(weight: Tensor) -> bool:
    """Whether at most two of each four consecutive weights along the last dimension are non-zero.

    Example:
        >>> is_two_four(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]]))
        True
        >>> is_two_four(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
        False
    """
    if weight.dim() == 0 or weight.shape[-1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(-1) <= 2).all())


def reason(layer: nn.Module) -> str | None:
    """Why a linear layer cannot be converted, in words; None if it can."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its attention layer reads the weight itself; it stays dense"
    if "weight" not in layer._parameters:
        return "its weight is computed by a parametrization; remove that first"
    if weight.device.type != "cuda":
        return f"it is on {weight.device}, and only CUDA devices have 2:4 instructions; move the model there"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _CAPABILITY:
        return f"its device has compute capability {capability[0]}.{capability[1]}, 2:4 needs 8.0 or more"
    return unfit(weight)


def unfit(weight: Tensor) -> str | None:
    """What of a weight's dtype, shape and zeros does not fit, in words, on any device; None if all fits."""
    if weight.dtype not in SHAPES:
        return f"its weight is {weight.dtype}; float16 and bfloat16 can be 2:4, convert with model.half()"
    rows, columns = SHAPES[weight.dtype]
    if not weight.numel() or weight.shape[0] % rows or weight.shape[1] % columns:
        return (
            f"its weight is {tuple(weight.shape)}, and 2:4 needs outputs and inputs that are multiples of "
            f"{rows} and {columns}"
        )
    if not is_two_four(weight):
        return "it is not 2:4 sparse: more than two of four consecutive inputs have a non-zero weight"
    return None
