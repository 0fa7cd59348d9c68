"""When a method is asked: the time of a schedule, and the learning rate that its layers have then."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lightning_rigl.methods.base import Moment
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.schedules import Timetable

_FIRST_RATE = "first_rate"  # its place among the numbers


def moment_of(
    optimizer: Optimizer,
    layer: SparseLayer,
    when: tuple[int, float | None],
    due: bool,
    timetable: Timetable | None,
    numbers: dict[str, dict[str, float]],
) -> Moment:
    """What a method is told of a step; ``layer``: the optimizer's first, whose rate and name count."""
    step, time = when[0], when[0] if when[1] is None else when[1]
    own, group = numbers.setdefault(layer.name, {}), _group(optimizer, layer)
    rate = _rate(group)
    if timetable is None:
        return Moment(step, rate=rate, due=due, numbers=own)
    share = 1.0
    if timetable.decay == "learning_rate":
        _refuse_none(rate, optimizer, "decay='learning_rate'")
        share = rate / (float(group.get("initial_lr", own.setdefault(_FIRST_RATE, rate))) or 1.0)
    return Moment(step, timetable.fraction(time, share), timetable.progress(time), rate, due, own)


def at_rate(moment: Moment, optimizer: Optimizer, layer: SparseLayer) -> Moment:
    """The same with the rate of one layer.

    Raises:
        RuntimeError: the optimizer has none.
    """
    rate = _rate(_group(optimizer, layer))
    _refuse_none(rate, optimizer, "the method")
    return replace(moment, rate=rate)


def _rate(group: dict[str, Any]) -> float:
    """The learning rate of a parameter group; nan of an optimizer that has none by torch's name for it."""
    rate = group.get("lr")
    return math.nan if rate is None else float(rate)


def _refuse_none(rate: float, optimizer: Optimizer, who: str) -> None:
    if math.isnan(rate):
        raise RuntimeError(
            f"{who} follows the learning rate, and {type(optimizer).__name__} has no 'lr' in its parameter "
            "groups"
        )


def _group(optimizer: Optimizer, layer: SparseLayer) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is layer.parameter for p in g["params"]))
