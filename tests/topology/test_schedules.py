"""When an update is due, and how much of the topology it replaces."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl import UpdateSchedule
from tests import reference


def due_steps(timetable, length):
    last, steps = -1, []
    for step in range(length):
        if timetable.due(step, last):
            steps.append(step)
            last = step
    return steps


def test_the_papers_imagenet_schedule():
    timetable = UpdateSchedule(every=100, end=25_000).resolve(None)
    steps = due_steps(timetable, 32_000)
    assert (steps[0], steps[-1], len(steps)) == (100, 24_900, 249)
    fractions = [timetable.fraction(step) for step in (0, 12_500, 25_000)]
    assert fractions == pytest.approx([0.3, 0.15, 0.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (UpdateSchedule(every=3, begin=0, end=9), [0, 3, 6]),
        (UpdateSchedule(every=3, begin=None, end=10), [3, 6, 9]),
        (UpdateSchedule(every=3, begin=4, end=10), [4, 7]),
        (UpdateSchedule(every=4, end=0.5), [4, 8]),
        (UpdateSchedule(every=4, begin=0.25, end=1.0), [5, 9, 13, 17]),
        (UpdateSchedule(every=1e1, end=2e1), [10]),
    ],
)
def test_due_steps(schedule, expected):
    assert due_steps(schedule.resolve(20), 20) == expected


def test_a_postponed_update_leaves_the_grid_unchanged():
    timetable = UpdateSchedule(every=10, end=40).resolve(None)
    assert timetable.due(10, last=-1)
    assert timetable.due(12, last=-1)  # still due
    assert not timetable.due(13, last=12)  # done late
    assert timetable.due(20, last=12)  # the next one is on time
    assert not timetable.due(40, last=12)


def test_a_replayed_step_does_not_update_twice():
    assert not UpdateSchedule(every=10, end=40).resolve(None).due(10, last=10)


@given(
    st.integers(0, 999),
    st.integers(1, 1000),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "inverse_power", "constant"]),
)
def test_fractions_equal_the_twin(step, end, alpha, decay):
    fraction = UpdateSchedule(drop_fraction=alpha, decay=decay, begin=0, end=end).resolve(None).fraction(step)
    expected = reference.drop_fraction(step, end, alpha, decay) if step < end else 0.0
    assert math.isclose(fraction, expected, abs_tol=1e-15)
    assert 0 <= fraction <= alpha


def test_the_number_dropped_is_truncated_in_double_precision():
    fraction = UpdateSchedule(every=1, drop_fraction=0.3, decay="constant", end=10).resolve(None).fraction(1)
    assert [int(fraction * active) for active in (1000, 7, 2**24 + 3)] == [300, 2, 5_033_165]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": 1.5}, "whole number of steps"),
        ({"end": 0.0}, "fraction of training"),
        ({"end": -1}, "whole number of steps"),
        ({"end": float("nan")}, "whole number"),
        ({"begin": 100, "end": 100}, "end=100 must come after begin=100"),
        ({"begin": 0.5, "end": 0.5}, "must come after"),
        ({"every": 100, "end": 50}, "end=50 must come after every=100, the first update"),
        ({"decay": ["cosine"]}, "the known ones are"),
        ({"every": 0}, "at least 1"),
        ({"every": 0.5}, "at least 1"),
        ({"drop_fraction": 1.1}, r"in \[0, 1\]"),
        ({"decay": "cosinus"}, "cosine, linear, inverse_power, constant"),
    ],
)
def test_bad_values_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        UpdateSchedule(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"end": "0.75"}, {"begin": True}, {"drop_fraction": "x"}, {"every": None}]
)
def test_other_types_are_refused(arguments):
    with pytest.raises(TypeError):
        UpdateSchedule(**arguments)


def test_a_fraction_of_an_unknown_length_names_the_way_out():
    with pytest.raises(ValueError, match=r"end=<steps>.*max_steps"):
        UpdateSchedule().resolve(None)
    assert UpdateSchedule(every=10, end=50).resolve(None).end == 50


def test_a_run_too_short_has_no_update():
    assert due_steps(UpdateSchedule(every=100).resolve(20), 20) == []
    assert due_steps(UpdateSchedule(every=100).resolve(1), 1) == []
