"""How a sparse training starts: masks at random, from weights, or from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_rigl.methods.base import Method
from lightning_rigl.model import layers, mask_files, sharding
from lightning_rigl.model.sparse_layer import private_generator
from lightning_rigl.topology.distributions import ERK, Distribution, PerLayer, check_sparsity
from lightning_rigl.topology.growth import Growth
from lightning_rigl.topology.patterns import Pattern

INITS = ("random", "magnitude", "nonzero")


def first_masks(
    model: nn.Module,
    sparsity: float | dict[str, float],
    distribution: Distribution,
    pattern: Pattern,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    init: str | Path | Mapping[str, Tensor],
    seed: int,
    method: Method,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The masks that a training starts with, and how many connections each layer is to have in the end.

    The arguments are those of `Sparsifier`. Changes nothing.
    """
    check(sparsity, distribution, init)
    if empty := [name for name, parameter in layers.named_parameters(model).items() if parameter.is_meta]:
        raise ValueError(f"{empty[0]} is on the meta device, without values; materialize the model first")
    distribution, overall = _budget(sparsity, distribution)
    if isinstance(init, str) and init in INITS:
        chosen = layers.select(model, include, exclude)
        if init == "nonzero":
            masks = nonzero_masks(chosen)
            return masks, {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        counts = distribution.counts({name: p.shape for name, p in chosen.items()}, overall)
        masks = drawn_masks(chosen, counts, pattern, init == "magnitude", seed)
        targets = {name: pattern.fit(chosen[name].shape, count) for name, count in counts.items()}
        if method.starts_dense:
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        return masks, targets
    given = mask_files.load_masks(init) if isinstance(init, (str, Path)) else init
    parameters = layers.named_parameters(model)
    dense = layers.matching(model, exclude or (), "exclude")
    masks = {name: mask for name, mask in given.items() if name not in dense}
    mask_files.check_masks(masks, parameters, method.scope == "model")
    masks = {name: mask.detach().to(parameters[name].device, copy=True) for name, mask in masks.items()}
    return masks, {name: int(mask.count_nonzero()) for name, mask in masks.items()}


def refuse_shards(
    parameters: Mapping[str, nn.Parameter], masks: Iterable[str], method: Method, growth: Growth
) -> None:
    """Raise ValueError for what is not known of parameters that are sharded over processes."""
    sharded = [name for name in masks if sharding.is_sharded(parameters[name])]
    asks = [question for question in ("observe", "disturb", "settle", "look") if method.has(question)]
    if sharded and (asks or method.latent or growth != Growth()):
        raise ValueError(
            f"{sharded[0]} is sharded over processes, and {type(method).__name__} with growth={growth} needs "
            "it whole: train with DDP, or with a method of two scores and growth=None"
        )


def check(sparsity: float | dict[str, float], distribution: Distribution, init: object) -> None:
    """Refuse what can be refused without a model.

    Raises:
        ValueError: a sparsity outside [0, 1), a dict of them beside a distribution, an unknown ``init``.
        TypeError: an ``init`` that is neither a string nor a dict of masks.
    """
    _budget(sparsity, distribution)
    if not isinstance(init, (str, Path, Mapping)):
        raise TypeError(f"init: expected a name, a path or a dict of masks, got {init!r}")
    if isinstance(init, str) and init not in INITS and not Path(init).exists():
        known = ", ".join(repr(name) for name in INITS)
        raise ValueError(
            f"init={init!r} is no known name and no file; the known ones are {known}, or give the path of a "
            "checkpoint or of masks saved with torch.save"
        )


def drawn_masks(
    layers: Mapping[str, nn.Parameter],
    counts: Mapping[str, int],
    pattern: Pattern,
    magnitude: bool,
    seed: int,
) -> dict[str, Tensor]:
    """Masks with exactly ``counts`` connections (what the pattern makes of them): random, or the largest.

    Raises:
        ValueError: a count outside 1 .. size of its layer.
    """
    fitted = {name: pattern.fit(layers[name].shape, count) for name, count in counts.items()}
    for name, count in fitted.items():
        if not 1 <= count <= layers[name].numel():
            raise ValueError(
                f"{name}: asked to keep {count} of {layers[name].numel()} connections (pattern {pattern}); "
                "at least 1 and at most all can stay: change the sparsity or exclude the layer"
            )
    masks = {}
    for name, count in fitted.items():
        weight = layers[name].detach()
        if magnitude:
            scores = sharding.full(weight).abs()
        else:
            random = torch.rand(weight.shape, generator=private_generator(seed, name, -1))
            scores = random.to(weight.device)
        masks[name] = sharding.shard(pattern.start(scores, count), weight)
    return masks


def nonzero_masks(layers: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The non-zeros of the weights as they are.

    Raises:
        ValueError: a layer has no non-zero weight, or no layer has a zero.
    """
    masks = {name: sharding.full(weight.detach()) != 0 for name, weight in layers.items()}
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise ValueError(
            f"init='nonzero': {', '.join(empty)} has no weight that is not zero; exclude the layer"
        )
    if all(mask.all() for mask in masks.values()):
        raise ValueError(
            "init='nonzero': the weights have no zeros, they are dense; load sparse ones first, or "
            "start with init='magnitude' or 'random'"
        )
    return masks


def _budget(sparsity: float | dict[str, float], distribution: Distribution) -> tuple[Distribution, float]:
    """The distribution and the sparsity to ask it for; a dict of sparsities is a distribution itself.

    Raises:
        ValueError: a sparsity outside [0, 1), or a dict beside a distribution other than the default.
    """
    if not isinstance(sparsity, dict):
        check_sparsity(sparsity)
        return distribution, sparsity
    if not sparsity:
        raise ValueError(
            "sparsity={} names no layer; give a sparsity, or a regular expression for each layer"
        )
    if distribution != ERK():
        raise ValueError(
            f"sparsity={sparsity!r} gives each layer its own; the distribution {distribution} has no say "
            "then: leave it out, or give one sparsity"
        )
    return PerLayer(sparsity), 0.0
