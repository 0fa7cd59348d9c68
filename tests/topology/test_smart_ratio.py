"""Smart-ratio: sparser towards the output, by a formula."""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.smart_ratio import SmartRatio

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
FOUR = {"a": (10, 10), "b": (10, 10), "c": (10, 10), "d": (10, 10)}


def exact(shapes, sparsity, own):
    """Slow twin in fractions, written from the paper: connections, and those that nobody could take."""
    names, size = list(shapes), {name: math.prod(shape) for name, shape in shapes.items()}
    layers = len(names)
    proportion = {n: Fraction((layers - i + 1) ** 2 + (layers - i + 1)) for i, n in enumerate(names, start=1)}
    free = (1 - Fraction(sparsity)) * sum(size.values()) - own
    weight = {name: proportion[name] * size[name] for name in names[:-1]}
    kept = {name: free * weight[name] / sum(weight.values()) for name in names[:-1]}
    for name, following in zip(names[:-1], [*names[1:-1], None], strict=True):
        overflow = max(kept[name] - size[name], Fraction(0))
        kept[name] -= overflow
        if following:
            kept[following] += overflow
    return {name: kept[name] for name in names[:-1]} | {names[-1]: Fraction(own)}, overflow


def test_four_equal_layers():
    """L = 4: proportions 20, 12, 6 for the first three, and 0.3 x 100 for the last.

    At 75 % there are 100 connections, 70 of them for the first three: 36.8, 22.1 and 11.1.
    """
    assert SmartRatio().counts(FOUR, 0.75) == {"a": 37, "b": 23, "c": 12, "d": 30}


def test_overflow_goes_to_the_following_layers():
    """At 25.1 % there are 299.6, 269.6 of them for the first three: 141.9, 85.1 and 42.6.

    The first has 41.9 too many; the second takes 14.9 of them, and the third the other 27.0. At 35 % there
    are 121.1, 72.6 and 36.3, and the second takes the whole 21.1.
    """
    assert SmartRatio().counts(FOUR, 0.251) == {"a": 100, "b": 100, "c": 70, "d": 30}
    assert SmartRatio().counts(FOUR, 0.35) == {"a": 100, "b": 94, "c": 37, "d": 30}


def test_lenet():
    counts = SmartRatio().counts(LENET, 0.9)
    assert counts == {"fc1": 24_743, "fc2": 1_578, "fc3": 300}
    assert SmartRatio(last=0.5).counts(LENET, 0.9)["fc3"] == 500
    assert SmartRatio(last=1).counts(LENET, 0.9)["fc3"] == 1_000


@st.composite
def networks(draw):
    dims = st.integers(1, 40)
    kernels = st.sampled_from([(), (1,), (3, 3), (5, 1)])
    return {f"l{i}": (draw(dims), draw(dims), *draw(kernels)) for i in range(draw(st.integers(2, 8)))}


@given(networks(), st.floats(0, 0.995), st.sampled_from([0.3, 0.05, 1.0]))
def test_counts_are_the_exact_ones_rounded_up(shapes, sparsity, last):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    *others, end = shapes
    own = sizes[end] - math.floor((1 - last) * sizes[end])
    total, free = sum(sizes.values()), (1 - sparsity) * sum(sizes.values()) - own
    assume(len(others) + 1e-6 <= free <= sum(sizes[name] for name in others) - 1e-6)
    counts = SmartRatio(last).counts(shapes, sparsity)
    assert list(counts) == list(shapes)
    assert all(1 <= counts[name] <= sizes[name] for name in shapes)
    assert -1e-6 <= sum(counts.values()) - (1 - sparsity) * total < len(shapes)
    twin, overflow = exact(shapes, sparsity, own)
    assert overflow == 0
    for name in others:
        assert -1e-6 <= counts[name] - twin[name] < 1 + 1e-6
    assert counts[end] == own
    assert counts[end] - last * sizes[end] < 1 + 1e-6


@given(networks(), st.floats(0.1, 0.99))
def test_densities_fall_towards_the_output(shapes, sparsity):
    try:
        counts = SmartRatio().counts(shapes, sparsity)
    except ValueError:
        assume(False)
    *others, _ = shapes
    bounds = [(counts[name] - 1, counts[name], math.prod(shapes[name])) for name in others]
    for (_, high, size), (low, _, next_size) in pairwise(bounds):
        assert low / next_size <= high / size + 1e-9


def refusal(shapes, sparsity, last=0.3):
    with pytest.raises(ValueError, match="distribution smartratio") as refused:
        SmartRatio(last).counts(shapes, sparsity)
    return str(refused.value)


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
@pytest.mark.parametrize("shapes", [LENET, FOUR, {"a": (3, 7), "b": (5, 11)}])
def test_an_impossible_budget_names_the_range_and_its_ends_are_possible(shapes, sparsity):
    if shapes is LENET:
        sparsity = 0.999 if sparsity else 0.0
    message = refusal(shapes, sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    least, most = map(float, re.search(r"can be ([\d.e-]+) to ([\d.e-]+):", message).groups())
    assert not least <= sparsity <= most
    full = SmartRatio().counts(shapes, least)
    *others, _ = shapes
    assert all(full[name] == sizes[name] for name in others)
    assert all(SmartRatio().counts(shapes, most)[name] >= 1 for name in others)
    for outside in (least - 1e-9, most + 1e-9):
        assert "can be" in refusal(shapes, outside)


def test_the_range_of_four_equal_layers():
    """From 3 x 100 + 30 of 400 connections to 3 x 1 + 30."""
    assert "can be 0.175 to 0.9175: change it, or last" in refusal(FOUR, 0.95)
    assert SmartRatio().counts(FOUR, 0.175) == {"a": 100, "b": 100, "c": 100, "d": 30}


def test_the_last_layer_alone_may_exceed_the_budget():
    message = refusal({"conv": (64, 64), "fc": (1000, 64)}, 0.9)
    assert (
        "leaves 6809.6 connections to 2 layers of 68096, and fc alone keeps 19200 of 64000 (last=0.3)"
        in message
    )
    assert SmartRatio(0.05).counts({"conv": (64, 64), "fc": (1000, 64)}, 0.9) == {"conv": 3_610, "fc": 3_200}


def test_one_layer_is_refused_and_none_is_nothing():
    assert "fc is the only layer" in refusal({"fc": (10, 10)}, 0.5)
    assert SmartRatio().counts({}, 0.5) == {}


@pytest.mark.parametrize("sparsity", [-0.1, 1, float("nan"), "0.9", True, None])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    for shapes in (LENET, {}):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            SmartRatio().counts(shapes, sparsity)


@pytest.mark.parametrize("last", [0, -0.1, 1.1, float("nan")])
def test_a_density_outside_its_range_is_refused(last):
    with pytest.raises(ValueError, match=r"last: a density, which must lie in \(0, 1\]"):
        SmartRatio(last)


@pytest.mark.parametrize("last", ["0.3", None, True])
def test_another_type_is_refused(last):
    with pytest.raises(TypeError, match="last: a number"):
        SmartRatio(last)


def test_numpy_numbers_and_the_short_name():
    assert SmartRatio(np.float32(0.5)).counts(LENET, np.float64(0.9)) == SmartRatio(0.5).counts(LENET, 0.9)
    assert Distribution.of("SmartRatio") == SmartRatio()
