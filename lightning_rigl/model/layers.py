"""Which parameters are sparse, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from lightning_rigl.topology.distributions import find

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers such as ``torch.compile``.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Cleaned name -> parameter, in module order; a tied parameter once, under its first name."""
    return dict(_names(model, remove_duplicate=True))


def _names(model: nn.Module, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Cleaned names and parameters; what a parallel wrapper calls ``module`` is no part of a name."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrapped = [f"{path}.".lstrip(".") for path, m in model.named_modules() if isinstance(m, parallel)]
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        for path in reversed(wrapped):  # the inner one first
            name = path + name[len(path) :].removeprefix("module.") if name.startswith(path) else name
        yield clean_name(name), parameter


def select(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that become sparse, in module order.

    By default: the weights of linear layers, all convolutions but depthwise ones (groups = in_channels > 1),
    RNNs, LSTMs and GRUs, and the in and out projections of attention. A parameter that an embedding shares, a
    frozen one and one of fewer than two dimensions stay dense.

    Args:
        model: any module.
        include: regular expressions searched in the cleaned names; they replace the default selection and may
            choose any floating parameter of two or more dimensions, embeddings too.
        exclude: regular expressions; what they match is then left dense.

    Raises:
        ValueError: a pattern matches nothing (near misses are named), or nothing is left to make sparse.

    Example:
        >>> list(select(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3), nn.LayerNorm(3))))
        ['1.weight']
    """
    chosen = {n: p for n, p in _chosen(model, include, exclude).items() if p.requires_grad}
    if not chosen:
        weights = [n for n, p in named_parameters(model).items() if _is_weight(n, p)]
        raise ValueError(
            f"{type(model).__name__} has no parameter to make sparse: of {len(weights)} weights of two "
            f"or more dimensions ({', '.join(weights[:5]) or 'none'}) none is selected and trainable; name "
            "some with include=[...], and check exclude and requires_grad"
        )
    _refuse_layouts(chosen)
    return chosen


def frozen(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that `select` would choose were they not frozen; they stay dense."""
    return {n: p for n, p in _chosen(model, include, exclude).items() if not p.requires_grad}


def _chosen(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    for what, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(what, patterns)
    weights = {n: p for n, p in named_parameters(model).items() if _is_weight(n, p)}
    if include is None:
        default = _default_weights(model)
        wanted = {n for n, p in weights.items() if id(p) in default}
    else:
        wanted = matching(model, include, "include")
        _refuse_sparse_gradients(model, wanted)
    wanted -= matching(model, exclude or (), "exclude")
    _refuse_normed(model, wanted)
    return {n: p for n, p in weights.items() if n in wanted}


def check_patterns(what: str, patterns: Sequence[str] | None) -> None:
    """Raise ValueError, with the argument's name, for anything but a list of regular expressions, or None."""
    if isinstance(patterns, str):
        raise ValueError(f"{what}: expected a list of regular expressions, got the string {patterns!r}")
    if not isinstance(patterns, (Sequence, type(None))):
        raise ValueError(f"{what}: expected a list of regular expressions, got {patterns!r}")
    try:
        for pattern in patterns or ():
            re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from error


def matching(model: nn.Module, patterns: Sequence[str], what: str) -> set[str]:
    """First names of the weights of which any name is found by a pattern: a tied weight has several.

    Raises:
        ValueError: a pattern finds nothing; it names the argument ``what``, and near misses.
    """
    first = {id(p): n for n, p in named_parameters(model).items() if _is_weight(n, p)}
    names = {n: first[id(p)] for n, p in _names(model, remove_duplicate=False) if id(p) in first}
    return {names[n] for pattern in patterns for n in find(pattern, list(names), what)}


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    if nn.parameter.is_lazy(parameter):
        raise ValueError(
            f"{name} is not initialised yet (a lazy module): pass one batch through the model first, for "
            "example in configure_model"
        )
    return parameter.is_floating_point() and parameter.dim() >= 2


def _default_weights(model: nn.Module) -> set[int]:
    """Identities of the weights that are sparse by default."""
    modules = list(model.modules())
    shared = {id(p) for m in modules if isinstance(m, _EMBEDDINGS) for p in m.parameters(recurse=False)}
    return {id(p) for m in modules for p in _weights_of(m)} - shared


def _weights_of(module: nn.Module) -> Iterator[Tensor]:
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() >= 2}
    if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        return  # depthwise
    if isinstance(module, (nn.Linear, _ConvNd)):
        yield from (p for n, p in own.items() if n == "weight")
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from (p for n, p in own.items() if n.startswith("weight_"))
    elif isinstance(module, nn.MultiheadAttention):
        yield from (p for n, p in own.items() if n.endswith("proj_weight"))


def _refuse_layouts(chosen: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in chosen.items():
        if parameter.layout != torch.strided:
            raise ValueError(
                f"{name} has the layout {parameter.layout}: masks need an ordinary tensor with zeros; take "
                "to_dense(), or exclude it"
            )


def _refuse_normed(model: nn.Module, wanted: set[str]) -> None:
    """The direction of weight_norm: a row without connections has the norm 0, by which it is divided."""
    normed = set()
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and any(isinstance(p, _WeightNorm) for p in module):
            normed.add(clean_name(f"{name}.original1".lstrip(".")))
        hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
        normed |= {clean_name(f"{name}.{hook.name}_v".lstrip(".")) for hook in hooks}
    if refused := sorted(wanted & normed):
        raise ValueError(
            f"{refused[0]} is the direction of weight_norm, which divides each row by its norm: one without "
            "connections becomes NaN; leave it out of include, or remove weight_norm"
        )


def _refuse_sparse_gradients(model: nn.Module, wanted: set[str]) -> None:
    for name, module in model.named_modules():
        full = clean_name(f"{name}.weight" if name else "weight")
        if isinstance(module, _EMBEDDINGS) and module.sparse and full in wanted:
            raise ValueError(
                f"{full}: an embedding with sparse=True has sparse gradients, which hide the dense gradient; "
                "make it sparse=False or leave it out of include"
            )
