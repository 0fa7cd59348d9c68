"""A total shared between layers: exact sums, no layer over its room, the same each time."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_rigl.topology.redistribution import fill, in_proportion, place, redistributed

WEIGHTS = st.floats(0, 1e30) | st.sampled_from([0.0, 1.0, 1e-300])


@st.composite
def rooms(draw):
    count = draw(st.integers(1, 8))
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    room = draw(st.lists(st.integers(0, 10**9) | st.integers(0, 5), min_size=count, max_size=count))
    return draw(st.integers(0, sum(room))), weights, room


@st.composite
def networks(draw):
    count = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 400) | st.integers(1, 3), min_size=count, max_size=count))
    active = [draw(st.integers(1, size)) for size in sizes]
    importance = draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    return active, sizes, importance, draw(st.floats(0, 1))


@settings(deadline=None)
@given(st.integers(0, 10**12), st.lists(WEIGHTS, min_size=1, max_size=8))
def test_shares_add_up_and_are_within_one_of_the_exact_ones(total, weights):
    counts = in_proportion(total, weights)
    assert sum(counts) == total
    exact = [Fraction(w) for w in weights] if any(weights) else [Fraction(1)] * len(weights)
    assert all(abs(c - total * w / sum(exact)) < 1 for c, w in zip(counts, exact, strict=True))
    assert counts == in_proportion(total, weights)


@settings(deadline=None)
@given(rooms(), st.booleans())
def test_what_fits_is_placed_and_no_layer_overflows(problem, evenly):
    total, weights, room = problem
    counts = fill(total, weights, room, evenly)
    assert sum(counts) == total
    assert all(0 <= count <= most for count, most in zip(counts, room, strict=True))
    assert counts == fill(total, weights, room, evenly)


@settings(deadline=None)
@given(rooms(), st.booleans())
def test_a_second_room_is_used_only_when_the_first_is_full(problem, evenly):
    total, weights, room = problem
    half = [most // 2 for most in room]
    rest = [most - first for most, first in zip(room, half, strict=True)]
    counts = place(total, weights, half, rest, evenly)
    assert sum(counts) == total
    if total <= sum(half):
        assert counts == fill(total, weights, half, evenly)
    else:
        assert all(first <= count <= most for first, count, most in zip(half, counts, room, strict=True))


@settings(deadline=None)
@given(networks())
def test_redistribution_keeps_the_total_and_every_layer(problem):
    active, sizes, importance, fraction = problem
    turnover = redistributed(active, sizes, importance, fraction)
    after = [a - dropped + grown for a, (dropped, grown) in zip(active, turnover, strict=True)]
    assert sum(after) == sum(active)
    assert all(1 <= count <= size for count, size in zip(after, sizes, strict=True))
    assert all(0 <= dropped < a for a, (dropped, _) in zip(active, turnover, strict=True))
    assert turnover == redistributed(active, sizes, importance, fraction)


@settings(deadline=None)
@given(networks())
def test_no_layer_is_filled_above_99_percent_while_another_has_room(problem):
    active, sizes, importance, fraction = problem
    turnover = redistributed(active, sizes, importance, fraction)
    free = [n - a + dropped for n, a, (dropped, _) in zip(sizes, active, turnover, strict=True)]
    most = [math.floor(Fraction(99, 100) * places) for places in free]
    assume(sum(grown for _, grown in turnover) <= sum(most))
    assert all(grown <= cap for (_, grown), cap in zip(turnover, most, strict=True))


def test_a_drawn_example():
    """Layers of 100 with 40, 40 and 90 active; importance 6 : 1 : 3; drop a half.

    The third is at sparsity 0.1, but its share of 0.3 is not above 1/3: it drops a half as the others do. 85
    go to the layers as 51, 8.5, 25.5: of equal remainders the lower index gets the one that is left.
    """
    assert redistributed([40, 40, 90], [100, 100, 100], [6.0, 1.0, 3.0], 0.5) == [(20, 51), (20, 9), (45, 25)]


def test_a_nearly_dense_layer_of_importance_drops_little_and_is_filled_to_99_percent():
    """The second is at sparsity 0.1 and has 0.9 of the importance: it drops 9, and of 19 places takes 18.

    29 were dropped: 2.9 and 26.1 by share. The 8 that the second cannot take go to the first.
    """
    assert redistributed([40, 90], [100, 100], [1.0, 9.0], 0.5) == [(20, 11), (9, 18)]


def test_what_a_full_layer_cannot_take_goes_round_evenly_or_by_weight():
    """Of 20 by 5 : 4 : 1 the first takes 1 of its 10; 9 are left over for the two that have 8 and 2."""
    assert fill(20, [5.0, 4.0, 1.0], [1, 90, 90], evenly=True) == [1, 13, 6]
    assert fill(20, [5.0, 4.0, 1.0], [1, 90, 90]) == [1, 15, 4]


def test_weights_of_zero_get_what_nothing_else_can_take():
    assert fill(5, [1.0, 0.0, 0.0], [2, 9, 9]) == [2, 2, 1]


def test_what_is_above_99_percent_of_a_layer_is_spread_evenly_over_the_others():
    """110 by 16 : 3 : 1 are 88, 16.5 -> 17 and 5.5 -> 5. The first takes 54 of its 55 places, 34 are left."""
    turnover = redistributed([75, 100, 100], [100, 1000, 1000], [8.0, 1.5, 0.5], 0.4)
    assert turnover == [(30, 54), (40, 17 + 17), (40, 5 + 17)]


def test_where_99_percent_of_all_is_too_little_all_is_used():
    assert redistributed([100, 50], [100, 50], [1.0, 1.0], 0.5) == [(50, 50), (25, 25)]


def test_a_product_in_floating_point_does_not_lose_one():
    assert in_proportion(2**53 + 1, [1.0, 1.0]) == [2**52 + 1, 2**52]
    assert in_proportion(10**9, [0.1, 0.2, 0.7]) == [100_000_000, 200_000_000, 700_000_000]


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [math.nan], [math.inf, 1.0], []])
def test_what_is_no_weight_is_refused(weights):
    with pytest.raises(ValueError, match="weights of at least 0"):
        in_proportion(3, weights)


@pytest.mark.parametrize("total", [-1, 6])
def test_what_does_not_fit_is_refused(total):
    with pytest.raises(ValueError, match=f"place {total} connections where 5 fit"):
        fill(total, [1.0, 1.0], [2, 3])
