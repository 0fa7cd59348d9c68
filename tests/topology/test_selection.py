"""Scores and counts -> masks: exact, ties by the lower flat index, the same on every dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rigl.topology.selection import drop, grow, top


def slow_top(scores, count, among):
    order = sorted((i for i in range(len(scores)) if among[i]), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:count])


@st.composite
def problems(draw):
    size = draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), 1e-40])
    any_value = st.floats(allow_nan=False, width=32)
    scores = draw(st.lists(st.one_of(few_values, any_value), min_size=size, max_size=size))
    among = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    count = draw(st.integers(0, sum(among)))
    return torch.tensor(scores, dtype=torch.float64).to(dtype), count, torch.tensor(among)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_top_equals_sorting(problem):
    scores, count, among = problem
    assert top(scores, count, among).nonzero().view(-1).tolist() == slow_top(scores, count, among)


def test_ties_go_to_the_lower_index():
    everything = torch.ones(6, dtype=torch.bool)
    assert top(torch.tensor([1.0, 2, 2, 2, 0, 2]), 2, everything).tolist() == [0, 1, 1, 0, 0, 0]
    assert top(torch.zeros(6), 3, everything).tolist() == [1, 1, 1, 0, 0, 0]
    assert top(torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, 0.0]), 2, everything).tolist() == [1, 1, 0, 0, 0, 0]


def test_scores_that_share_their_upper_bits_are_told_apart():
    one = torch.tensor(1.0)
    close = torch.stack([one, torch.nextafter(one, one + 1), one, torch.nextafter(one, one + 1)])
    assert top(close, 2, torch.ones(4, dtype=torch.bool)).tolist() == [False, True, False, True]
    fine = torch.tensor([1.0, 1.0 + 2**-52, 1.0, 1.0 + 2**-51], dtype=torch.float64)
    assert top(fine, 1, torch.ones(4, dtype=torch.bool)).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_nan_of_any_sign_ranks_above_infinity(dtype):
    nan = torch.tensor([1.0, float("inf"), float("nan"), 2.0, float("nan")], dtype=dtype)
    nan[4] = -nan[4]
    assert top(nan, 2, torch.ones(5, dtype=torch.bool)).tolist() == [False, False, True, False, True]
    nan[0] = -1.0  # another path: there are signs
    assert top(nan, 3, torch.ones(5, dtype=torch.bool)).tolist() == [False, True, True, False, True]


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(0, 1))
def test_what_an_update_chooses(problem, fraction):
    """Kept within active, grown disjoint from kept, counts exact, and the same each time."""
    scores, _, active = problem
    count = int(fraction * int(active.sum()))
    kept = drop(scores, active, count)
    new = grow(scores.flip(0), kept, count)
    assert not (kept & ~active).any()
    assert int(kept.sum()) == int(active.sum()) - count
    assert (new | kept).equal(new)
    assert int((new & ~kept).sum()) == count
    assert torch.equal(new, grow(scores.flip(0), drop(scores, active, count), count))


def test_drop_never_keeps_an_inactive_connection_and_grow_never_takes_a_kept_one():
    active = torch.tensor([True, True, False, False, True])
    kept = drop(torch.zeros(5), active, 1)  # all tie at zero with the inactive ones
    assert kept.tolist() == [True, True, False, False, False]
    new = grow(torch.zeros(5), kept, 1)
    assert new.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("count", [-1, 3])
def test_a_count_outside_the_candidates_is_refused(count):
    with pytest.raises(ValueError, match=f"select {count} of 2 candidates"):
        top(torch.zeros(3), count, torch.tensor([True, False, True]))


def test_no_layer_is_sorted():
    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("sort", "topk", "kthvalue", "argsort", "msort"):
                self.sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        top(torch.randn(1_000_000), 10_000, torch.ones(1_000_000, dtype=torch.bool))
    assert max(watch.sizes) <= 5_000  # a sample


@pytest.mark.parametrize("shape", ["random", "ascending", "descending", "periodic", "constant", "few"])
@pytest.mark.parametrize("share", [0.0001, 0.03, 0.5, 0.97])
def test_large_layers_are_exact_whatever_the_sample_sees(shape, share):
    size = 200_003
    scores = {
        "random": torch.randn(size),
        "ascending": torch.arange(size).float(),
        "descending": -torch.arange(size).float(),
        "periodic": torch.arange(size).remainder(49).float(),  # follows the sample's stride
        "constant": torch.zeros(size),
        "few": torch.zeros(size).index_fill(0, torch.tensor([5, size - 1]), 1.0),
    }[shape]
    among = torch.rand(size) < 0.6
    count = int(share * int(among.sum()))
    order = torch.where(among, scores, float("-inf")).argsort(descending=True, stable=True)
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(top(scores, count, among), expected)


def test_large_layers_with_massive_ties():
    scores = torch.randint(0, 3, (300, 1000)).float()
    among = torch.rand(300, 1000) < 0.5
    chosen = top(scores, 60_000, among)
    order = torch.where(among, scores, -1.0).view(-1).argsort(descending=True, stable=True)
    expected = torch.zeros(300_000, dtype=torch.bool)
    expected[order[:60_000]] = True
    assert torch.equal(chosen.view(-1), expected)
