"""When a method is asked: the time of a schedule, and the learning rate that its layers have then."""

from __future__ import annotations

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
    rate = float(group["lr"])
    first = float(group.get("initial_lr", own.setdefault(_FIRST_RATE, rate))) or 1.0
    if timetable is None:
        return Moment(step, rate=rate, due=due, numbers=own)
    return Moment(step, timetable.fraction(time, rate / first), timetable.progress(time), rate, due, own)


def at_rate(moment: Moment, optimizer: Optimizer, layer: SparseLayer) -> Moment:
    """The same with the rate of one layer."""
    return replace(moment, rate=float(_group(optimizer, layer)["lr"]))


def _group(optimizer: Optimizer, layer: SparseLayer) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is layer.parameter for p in g["params"]))
