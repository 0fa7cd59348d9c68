"""What a training of a known length costs by its real schedule, and how long it may be for a given cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, TypeAlias

from lightning_rigl.flops.formulas import RunCost, SampleCost
from lightning_rigl.topology.schedules import Timetable, UpdateSchedule

Gradient = Literal["never", "at_updates", "every_step"]
Stage: TypeAlias = Callable[[float | None], SampleCost]


def updates_due(schedule: UpdateSchedule | None, steps: int) -> int:
    """How many of the steps 0, 1, ..., ``steps`` - 1 are updates: those that `Timetable.due` names.

    Args:
        schedule: when the topology is updated; None: never.
        steps: the length of training in optimizer steps; fractions of the schedule are fractions of it.

    Example:
        >>> updates_due(UpdateSchedule(every=100, end=0.75), steps=1000)
        7
    """
    if schedule is None:
        return 0
    timetable = schedule.resolve(steps)
    return max(0, -(-(min(timetable.end, steps) - timetable.begin) // timetable.every))  # rounded up


def run_cost(
    cost: SampleCost,
    steps: int,
    gradient: Gradient = "at_updates",
    schedule: UpdateSchedule | None = None,
    batch_size: int = 1,
    stage: Stage | None = None,
) -> RunCost:
    """What ``steps`` optimizer steps cost, an update taking the place of a step.

    Args:
        cost: what one sample costs; the same at each step, where an update keeps the counts.
        steps: optimizer steps, updates among them.
        gradient: when the method reads the gradient of inactive connections.
        schedule: when the topology is updated; None: never.
        batch_size: samples per optimizer step, those of all micro-batches together.
        stage: what a sample costs after the update at a progress, and before the first (None), where that
            changes; ``cost`` has no say then.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> lenet = SampleCost(53242, 532400, actual=112684, actual_update=591842)
        >>> run = run_cost(lenet, 1000, schedule=UpdateSchedule(every=100, end=0.75), batch_size=64)
        >>> run.train, run.train_dense
        (10437126784, 102220800000)
    """
    if stage is not None and schedule is not None:
        return _staged(stage, steps, gradient, schedule.resolve(steps), batch_size)
    updates = updates_due(schedule, steps)
    ordinary = RunCost().after((steps - updates) * batch_size, cost, gradient=gradient)
    return ordinary.after(updates * batch_size, cost, gradient=gradient, updated=True)


def _staged(stage: Stage, steps: int, gradient: Gradient, timetable: Timetable, batch_size: int) -> RunCost:
    run, cost, done = RunCost(), stage(None), 0
    for step in range(timetable.begin, min(timetable.end, steps), timetable.every):
        run = run.after((step - done) * batch_size, cost, gradient=gradient)
        run = run.after(batch_size, cost, gradient=gradient, updated=True)
        cost, done = stage(timetable.progress(step)), step + 1
    return run.after((steps - done) * batch_size, cost, gradient=gradient)


def longest_run(
    budget: int,
    cost: SampleCost,
    gradient: Gradient = "at_updates",
    schedule: UpdateSchedule | None = None,
    batch_size: int = 1,
    stage: Stage | None = None,
) -> int:
    """The most optimizer steps whose `run_cost` stays within a budget, as its ``train`` counts.

    Moments of the schedule that are fractions follow the length.

    Args:
        budget: FLOPs.
        cost: as for `run_cost`, like the other arguments.
        gradient: when the method reads the gradient of inactive connections.
        schedule: when the topology is updated; None: never.
        batch_size: samples per optimizer step.
        stage: as for `run_cost`.

    Raises:
        ValueError: the budget does not pay for one step, or a step costs nothing.

    Example:
        >>> longest_run(1000 * 3 * 532400, SampleCost(53242, 532400), schedule=UpdateSchedule())
        9780
    """

    def spent(steps: int) -> int:
        return run_cost(cost, steps, gradient, schedule, batch_size, stage).train

    ordinary = run_cost(cost, 1, gradient, None, batch_size).train
    within, beyond = 0, budget // max(ordinary, 1) + 1
    while beyond - within > 1:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if spent(middle) <= budget else (within, middle)
    # Where ``begin`` is a fraction, a step more can be an update less, as the grid of updates moves with it.
    window = run_cost(cost, 1, "every_step", None, batch_size).train // max(ordinary, 1) + 2
    longest = max(steps for steps in range(within, within + window) if spent(steps) <= budget)
    if longest < 1 or ordinary < 1:
        raise ValueError(
            f"budget: {budget:,} FLOPs, and the first step of {batch_size} samples costs {spent(1):,}; "
            "give more (a multiple of the dense training has an x, as '1.0x'), or fewer samples per step"
        )
    return longest


def budget_in_flops(budget: str | float, dense_step: int, steps: int | None) -> int:
    """A budget in FLOPs: as many as given, or ``"1.5x"`` times those of the dense training.

    Args:
        budget: a number of FLOPs, or a multiple with an ``x`` behind it.
        dense_step: FLOPs of one step of the dense model.
        steps: the length of the dense training in optimizer steps; only a multiple needs it.

    Raises:
        ValueError: no positive number, or a multiple of an unknown length.

    Example:
        >>> budget_in_flops("1.5x", dense_step=1000, steps=10), budget_in_flops("2e4", 1000, None)
        (15000, 20000)
    """
    text = str(budget).strip()
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e\+?\d+)?(x?)", text, re.IGNORECASE)
    if number is None:
        raise ValueError(
            f"budget: a multiple of the dense training such as '1.0x', or a number of FLOPs, got {budget!r}"
        )
    if not number[3]:
        return int(Fraction(text))
    if steps is None:
        raise ValueError(
            f"budget={budget!r} is a multiple of the dense training, whose length is unknown; give its steps"
        )
    return int(Fraction(text[:-1]) * dense_step * steps)
