"""A step -> is an update due, and what fraction of the active connections it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Decay = Literal["cosine", "linear", "inverse_power", "constant", "learning_rate"]
Policy = Literal["skip_step", "after_step"]

_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "inverse_power": lambda progress: (1 - progress) ** 3,
    "constant": lambda progress: 1.0,
    "learning_rate": lambda progress: 1.0,
}


@dataclass(frozen=True)
class UpdateSchedule:
    """When the topology is updated, and how much of it.

    Updates are due at steps ``begin, begin + every, ...`` before ``end``; the drop fraction at step t is
    alpha/2 (1 + cos(pi t / end)) for the cosine decay, with t counted from 0 (section 3 (2) of the paper).
    Steps are optimizer steps; a moment may also be a fraction of training in (0, 1], resolved when its length
    is known.

    Args:
        every: steps between updates, at least 1 (Delta T in the paper).
        drop_fraction: share of a layer's active connections replaced at t = 0, in [0, 1] (alpha).
        decay: how the drop fraction falls: ``cosine``, ``linear`` (1 - t/end), ``inverse_power``
            (1 - t/end)^3, ``constant``, or with the optimizer's ``learning_rate``, as a share of its
            ``initial_lr``: the rate that the optimizer was made with, which torch's schedulers keep there
            (OneCycleLR: its own first rate), and without a scheduler the rate of the first step. In a warm-up
            the fraction is therefore as small as the rate is; above that rate (OneCycleLR, nearly always) it
            stays ``drop_fraction``.
        begin: first update; None means ``every`` (before any training, |w| is only noise), 0 is the paper's
            Algorithm 1 to the letter.
        end: no update is due at this step or later.
        policy: an update takes the place of the optimizer step (``skip_step``, the paper), or follows it
            (``after_step``), with the gradient of that step.

    Raises:
        ValueError: a value outside its range; ``end <= begin`` given in steps.
        TypeError: a value of another type.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134.

    Example:
        >>> timetable = UpdateSchedule(every=100, end=0.75).resolve(1000)
        >>> timetable.end, [t for t in range(1000) if timetable.due(t, last=t - 1)]
        (750, [100, 200, 300, 400, 500, 600, 700])
        >>> round(timetable.fraction(375), 3)
        0.15
    """

    every: int = 100
    drop_fraction: float = 0.3
    decay: Decay = "cosine"
    begin: int | float | None = None
    end: int | float = 0.75
    policy: Policy = "skip_step"

    def __post_init__(self) -> None:
        every = self.every
        if isinstance(every, bool) or not isinstance(every, (int, float)):
            raise TypeError(f"every: the steps between two updates, a whole number, got {every!r}")
        if not every >= 1 or every % 1:
            raise ValueError(
                f"every: the steps between two updates, a whole number of at least 1, got {every!r}"
            )
        object.__setattr__(self, "every", int(every))  # 1e2 arrives from a command line as a float
        object.__setattr__(self, "end", _moment("end", self.end))
        if self.begin is not None:
            object.__setattr__(self, "begin", _moment("begin", self.begin))
        if isinstance(self.drop_fraction, bool) or not isinstance(self.drop_fraction, (int, float)):
            raise TypeError(f"drop_fraction: a number in [0, 1], got {self.drop_fraction!r}")
        if not 0 <= self.drop_fraction <= 1:
            raise ValueError(
                f"drop_fraction: the share of active connections, in [0, 1], got {self.drop_fraction!r}"
            )
        if not isinstance(self.decay, str) or self.decay not in _DECAYS:
            raise ValueError(f"decay: unknown name {self.decay!r}; the known ones are {', '.join(_DECAYS)}")
        if self.policy not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise ValueError(f"policy: unknown name {self.policy!r}; the known ones are {known}")
        begin = self.every if self.begin is None else self.begin
        if type(self.end) is type(begin) and self.end <= begin:
            first = f"every={begin}, the first update" if self.begin is None else f"begin={begin}"
            raise ValueError(f"end={self.end} must come after {first}; no update would ever be due")

    @property
    def in_steps(self) -> bool:
        """Whether no moment is a fraction of training."""
        return not isinstance(self.begin, float) and not isinstance(self.end, float)

    def resolve(self, total: int | None) -> Timetable:
        """The same schedule in steps.

        Args:
            total: the length of training in optimizer steps; None if unknown.

        Raises:
            ValueError: a fraction of an unknown length.
        """
        begin = self.every if self.begin is None else self.begin
        if total is None and not self.in_steps:
            raise ValueError(
                f"the update schedule has begin={begin!r}, end={self.end!r}, a fraction of training, but the "
                "length of training is unknown; give end=<steps>, or limit the training with max_steps"
            )
        begin, end = (m if isinstance(m, int) else math.floor(m * (total or 0)) for m in (begin, self.end))
        return Timetable(self.every, self.drop_fraction, self.decay, begin, end, self.policy)


@dataclass(frozen=True)
class Timetable:
    """An `UpdateSchedule` with every moment in steps; there are no updates if ``begin >= end``."""

    every: int
    drop_fraction: float
    decay: Decay
    begin: int
    end: int
    policy: Policy = "skip_step"

    def due(self, step: int, last: int, clock: float | None = None) -> bool:
        """Whether an update is due at ``step`` (steps already done) if the last one took place at ``last``.

        A postponed update stays due; the grid does not move. ``clock``: the time of ``end``, if not ``step``.
        """
        if step < self.begin or (step if clock is None else clock) >= self.end:
            return False
        return step - (step - self.begin) % self.every > last

    def fraction(self, step: float, rate: float = 1.0) -> float:
        """The drop fraction at ``step``, in [0, 1]; 0 from ``end`` on. ``rate``: a share of the first one."""
        share = _DECAYS[self.decay](step / max(self.end, 1))
        factor = min(rate, 1.0) if self.decay == "learning_rate" else share
        return self.drop_fraction * factor if step < self.end else 0.0

    def progress(self, step: float) -> float:
        """How far the updates are: 0 at the first, exactly 1 at the last (and 1 if there is only one)."""
        last = self.begin + (self.end - 1 - self.begin) // self.every * self.every
        return min(max((step - self.begin) / (last - self.begin), 0.0), 1.0) if last > self.begin else 1.0


def _moment(name: str, value: object) -> int | float:
    """An int as it is, a whole float above 1 as an int, a float in (0, 1] as a fraction of training."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number of steps or a fraction of training, got {value!r}")
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and value > 1 and value.is_integer():
        return int(value)
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(
        f"{name}={value!r} is neither a whole number of steps from 0 on nor a fraction of training "
        "in (0, 1]; write an int for steps, a float for a fraction"
    )
