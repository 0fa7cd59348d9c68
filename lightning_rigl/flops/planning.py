"""Before training: what it will cost, how long it may be, and which sparsity reaches a ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal

from lightning_rigl.flops.costs import Convention, check_convention
from lightning_rigl.flops.formulas import SampleCost, sample_cost
from lightning_rigl.flops.measure import Measurement, Source, measurement
from lightning_rigl.flops.plan import FLOPsPlan, layer_rows
from lightning_rigl.flops.runs import Stage
from lightning_rigl.flops.size import model_bytes
from lightning_rigl.methods.base import Method
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.schedules import UpdateSchedule


def plan_flops(
    source: Source,
    *example: Any,
    sparsity: float = 0.9,
    distribution: Distribution | str = "erk",
    method: Method | str = "rigl",
    schedule: UpdateSchedule | None = None,
    steps: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    batch_size: int | None = None,
    convention: Convention = "2mac",
) -> FLOPsPlan:
    """What a sparse training will cost, without training.

    Args:
        source: a module (it is not changed and not run with values), a `CostTable`, or bare shapes: layer
            name -> (shape of the weight, output positions per sample).
        example: inputs of the module: tensors or shapes; none for a table or shapes.
        sparsity: fraction of zeros over the sparse layers, in [0, 1).
        distribution: how the connections are shared between layers, or its short name.
        method: which method trains, or its short name; one that shares connections between layers while it
            trains is planned as if it did not.
        schedule: when the topology is updated; None is the method's own default.
        steps: length of training in optimizer steps; without it there are closed forms only.
        include: regular expressions of the layers to make sparse, in place of the default; of a table or
            bare shapes that is every weight of two or more dimensions.
        exclude: regular expressions of layers that stay dense.
        batch_size: samples per optimizer step; None: the first dimension of the example, or 1.
        convention: ``2mac`` counts two FLOPs per multiply-add; ``official`` adds one per output element. The
            model's size follows it: ``official`` takes one bias per output channel as the only parameters
            besides the weights, ``2mac`` all parameters of a module, and none of a table or bare shapes.

    Returns:
        A frozen plan; ``print`` shows it as tables, `FLOPsPlan.to_json` has all its numbers.

    Raises:
        ValueError: a value outside its range, or a model that cannot be measured.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> plan = plan_flops({"1": ((300, 784), 1), "2": ((100, 300), 1), "3": ((10, 100), 1)}, sparsity=0.9)
        >>> plan.cost.forward, round(plan.forward_ratio, 4), round(plan.training["rigl"], 4)
        (53242, 0.1, 0.103)
    """
    known = measurement(source, *example, include=include, exclude=exclude, batch_size=batch_size)
    return _plan(known, sparsity, distribution, method, schedule, steps, convention)


def steps_for_budget(
    source: Source,
    *example: Any,
    budget: str | float = "1.0x",
    steps: int | None = None,
    sparsity: float = 0.9,
    distribution: Distribution | str = "erk",
    method: Method | str = "rigl",
    schedule: UpdateSchedule | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    batch_size: int | None = None,
    convention: Convention = "2mac",
) -> int:
    """How many optimizer steps of a sparse training a budget pays for: the ``max_steps`` of a Trainer.

    The cost is that of the real schedule, whose moments given as fractions follow the new length; so does a
    learning rate that follows the Trainer's.

    Args:
        source: as for `plan_flops`, like the arguments not named here.
        example: inputs of a module; their first dimension is the batch size.
        budget: a multiple of what the dense training costs, as ``"1.0x"``, or a number of FLOPs.
        steps: length of the dense training in optimizer steps; a number of FLOPs needs none.
        sparsity: fraction of zeros over the sparse layers, in [0, 1).
        distribution: how the connections are shared between layers, or its short name.
        method: which method trains, or its short name.
        schedule: when the topology is updated; None is the method's own default.
        include: regular expressions of the layers to make sparse, in place of the default.
        exclude: regular expressions of layers that stay dense.
        batch_size: samples per optimizer step; None: the first dimension of the example, or 1.
        convention: how FLOPs are counted.

    Raises:
        ValueError: as `plan_flops`; a budget that does not pay for one step.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, sec. 4.1:
        extended training.

    Example:
        >>> lenet = {"1": ((300, 784), 1), "2": ((100, 300), 1), "3": ((10, 100), 1)}
        >>> steps_for_budget(lenet, budget="1.0x", steps=1000, sparsity=0.9)
        9780
    """
    plan = plan_flops(
        source,
        *example,
        sparsity=sparsity,
        distribution=distribution,
        method=method,
        schedule=schedule,
        steps=steps,
        include=include,
        exclude=exclude,
        batch_size=batch_size,
        convention=convention,
    )
    return plan.within(budget).steps or 0


def sparsity_for_ratio(
    source: Source,
    *example: Any,
    ratio: float,
    of: Literal["inference", "training"] = "inference",
    distribution: Distribution | str = "erk",
    method: Method | str = "rigl",
    schedule: UpdateSchedule | None = None,
    steps: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convention: Convention = "2mac",
) -> float:
    """The smallest sparsity whose FLOPs are at most a given share of the dense model's.

    Args:
        source: as for `plan_flops`, like the arguments not named here.
        example: inputs of a module.
        ratio: the share, in (0, 1].
        of: ``inference``: f_S / f_D; ``training``: by the schedule if ``steps`` are given, else by the
            method's closed form.
        distribution: how the connections are shared between layers, or its short name.
        method: which method trains, or its short name; only for ``training``.
        schedule: when the topology is updated; None is the method's own default.
        steps: length of training in optimizer steps.
        include: regular expressions of the layers to make sparse, in place of the default.
        exclude: regular expressions of layers that stay dense.
        convention: how FLOPs are counted.

    Returns:
        A sparsity in [0, 1), a whole number of zeros over the size of the sparse layers.

    Raises:
        ValueError: as `plan_flops`; a ratio that no sparsity reaches, with those that can be reached.

    Example:
        >>> lenet = {"1": ((300, 784), 1), "2": ((100, 300), 1), "3": ((10, 100), 1)}
        >>> round(sparsity_for_ratio(lenet, ratio=0.1), 4)
        0.9
    """
    known = measurement(source, *example, include=include, exclude=exclude)
    if of not in ("inference", "training"):
        raise ValueError(f"of: the ratio of 'inference' or of 'training', got {of!r}")
    total = sum(math.prod(shape) for shape in known.shapes.values())
    chosen = Distribution.of(distribution)

    def reached(zeros: int) -> float:
        plan = _plan(known, zeros / total, chosen, method, schedule, steps, convention)
        return plan.forward_ratio if of == "inference" else plan.training_ratio

    def possible(zeros: int) -> bool:
        try:
            return bool(chosen.counts(known.shapes, zeros / total))
        except ValueError:
            return False

    highest, least = reached(0), _last(total, possible)
    lowest = reached(least)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not lowest <= ratio <= highest:
        raise ValueError(
            f"ratio: {of} FLOPs of {ratio!r} times the dense model's cannot be reached with {chosen}: "
            f"they go from {lowest:.4g} at sparsity {least / total:.6g} to {highest:.4g} at sparsity 0"
        )
    above = _last(least + 1, lambda zeros: reached(zeros) > ratio) if reached(0) > ratio else -1
    return (above + 1) / total


def _plan(
    known: Measurement,
    sparsity: float,
    distribution: Distribution | str,
    method: Method | str,
    schedule: UpdateSchedule | None,
    steps: int | None,
    convention: Convention,
) -> FLOPsPlan:
    check_convention(convention)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"steps: the length of training in optimizer steps, at least 1, got {steps!r}")
    distribution, method = Distribution.of(distribution), Method.of(method)
    if method.prunes_along and not method.has("planned"):
        raise ValueError(
            f"method {type(method).__name__} starts dense and does not say how it comes to its target: give "
            "it planned(size, target, progress), a layer's connections after the update at that progress"
        )
    counts = distribution.counts(known.shapes, sparsity)
    others = known.others or 0
    if convention == "official":
        others = sum(shape[0] for shape in known.weights.values())
    return FLOPsPlan(
        layers=layer_rows(known.table, counts, convention),
        cost=sample_cost(known.table, counts, convention),
        other=known.table.other,
        sparsity=sparsity,
        distribution=repr(distribution) if is_dataclass(distribution) else type(distribution).__name__,
        method=type(method).__name__,
        gradient=method.gradient,
        schedule=schedule if schedule and method.schedule else method.schedule,
        every=(schedule or method.schedule or UpdateSchedule()).every,
        bytes_dense=model_bytes(known.weights, {}, others),
        bytes_sparse=model_bytes(known.weights, counts, others),
        batch_size=known.batch_size,
        steps=steps,
        convention=convention,
        unknown=known.table.unknown,
        unseen=known.unseen,
        stage=_stage(known, counts, method, convention) if method.starts_dense else None,
    )


def _stage(known: Measurement, targets: Mapping[str, int], method: Method, convention: Convention) -> Stage:
    """What a sample costs at each time of a training that starts dense."""
    sizes = {name: math.prod(known.shapes[name]) for name in targets}

    @cache
    def cost(progress: float | None) -> SampleCost:
        if progress is None:
            return sample_cost(known.table, {}, convention)
        counts = {name: method.planned(sizes[name], targets[name], progress) for name in targets}
        return sample_cost(known.table, counts, convention)

    return cost


def _last(end: int, holds: Callable[[int], bool]) -> int:
    """The last number below ``end`` for which something holds that holds for 0 and then up to some number."""
    yes, no = 0, end
    while no - yes > 1:
        middle = (yes + no) // 2
        yes, no = (middle, no) if holds(middle) else (yes, middle)
    return yes
