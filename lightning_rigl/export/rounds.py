"""Times of several variants of one computation, measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

FEWEST, MOST = 5, 1000  # rounds


@dataclass(frozen=True)
class Timing:
    """How long a variant takes, beside the first one.

    Args:
        seconds: median over the rounds.
        ratio: median over the rounds of the first variant's time over this one's; above 1 it is faster.
        low: the first quartile of these ratios: three rounds of four gave at least that.
    """

    seconds: float
    ratio: float
    low: float


def rounds(
    runs: Mapping[str, Callable[[], Callable[[], object]]],
    seconds: float,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """The times of each variant, one of each round.

    A round runs each variant once; every other round goes backwards, so that none always profits from what
    the one before has left in the caches. There are at least 5 rounds, and more until the time is up.

    Args:
        runs: name -> what prepares a run, outside the time, and gives it.
        seconds: how long to go on.
        clock: seconds since some moment.

    Example:
        >>> ticks = iter(range(1000))
        >>> runs = {"a": lambda: lambda: None, "b": lambda: lambda: next(ticks)}
        >>> found = rounds(runs, 0, lambda: next(ticks))
        >>> found["a"], found["b"]
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2])
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, done = clock() + seconds, 0
    while done < FEWEST or (done < MOST and clock() < end):
        names = list(runs)
        for name in names if done % 2 == 0 else names[::-1]:
            run = runs[name]()
            start = clock()
            run()
            times[name].append(clock() - start)
        done += 1
    return times


def timings(times: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Medians, and ratios to the first variant.

    Example:
        >>> timings({"dense": [4.0, 4.0, 9.0], "fast": [2.0, 1.0, 3.0]})["fast"]
        Timing(seconds=2.0, ratio=3.0, low=2.5)
    """
    first = next(iter(times.values()))
    found = {}
    for name, own in times.items():
        ratios = sorted(a / max(b, 1e-12) for a, b in zip(first, own, strict=True))
        low = statistics.quantiles(ratios, n=4, method="inclusive")[0] if len(ratios) > 1 else ratios[0]
        found[name] = Timing(statistics.median(own), statistics.median(ratios), low)
    return found
