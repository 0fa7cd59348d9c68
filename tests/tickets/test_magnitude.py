"""Which connections a round removes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl.tickets.magnitude import pruned, to_prune


def full(weights):
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def test_the_worked_example():
    """Two layers, |w| in one ranking: the three smallest are 0.1, 0.2 and 0.3."""
    weights = {
        "a": torch.tensor([[0.9, -0.1], [0.4, -0.7]]),
        "b": torch.tensor([0.3, -0.8, 0.2, 0.5]),
    }
    kept = pruned(weights, full(weights), 3)
    assert kept["a"].tolist() == [[True, False], [True, True]]
    assert kept["b"].tolist() == [False, True, False, True]
    again = pruned(weights, kept, 2)  # 0.4 and 0.5 of those that are left
    assert again["a"].tolist() == [[True, False], [False, True]]
    assert again["b"].tolist() == [False, True, False, False]


def test_what_is_pruned_stays_so_however_large_its_weight_is():
    weights = {"a": torch.tensor([9.0, 1.0, 2.0])}
    assert pruned(weights, {"a": torch.tensor([False, True, True])}, 1)["a"].tolist() == [False, False, True]


def test_of_equal_magnitudes_the_earlier_layer_and_the_lower_index_stay():
    weights = {"b": torch.tensor([-1.0, 1.0]), "a": torch.tensor([1.0, -1.0])}
    kept = pruned(weights, full(weights), 1)
    assert (kept["b"].tolist(), kept["a"].tolist()) == ([True, True], [True, False])


def slow(weights, masks, count):
    """Numpy: sort all active connections by magnitude, then layer, then place; the last ones go first."""
    rows = [
        (-abs(weights[name].reshape(-1)[place]), layer, place)
        for layer, (name, mask) in enumerate(masks.items())
        for place in np.flatnonzero(mask)
    ]
    keep = {(layer, place) for _, layer, place in sorted(rows)[: len(rows) - count]}
    return {
        name: np.array([(layer, place) in keep for place in range(mask.size)]).reshape(mask.shape)
        for layer, (name, mask) in enumerate(masks.items())
    }


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    share=st.floats(0, 1),
)
def test_the_slow_twin(shapes, seed, share):
    draw = np.random.default_rng(seed)
    weights = {str(i): draw.integers(-3, 4, shape).astype(np.float32) for i, shape in enumerate(shapes)}
    masks = {name: draw.random(weight.shape) < 0.7 for name, weight in weights.items()}
    count = int(share * sum(mask.sum() for mask in masks.values()))
    expected = slow(weights, masks, count)
    tensors = [{n: torch.from_numpy(v) for n, v in each.items()} for each in (weights, masks)]
    if any(not mask.any() for mask in expected.values()):
        with pytest.raises(ValueError, match="no connection left"):
            pruned(*tensors, count)
        return
    kept = pruned(*tensors, count)
    assert all((kept[name].numpy() == mask).all() for name, mask in expected.items())
    assert sum(int(m.sum()) for m in kept.values()) == sum(m.sum() for m in masks.values()) - count


def test_the_arguments_are_not_changed():
    weights = {"a": torch.tensor([1.0, 2.0])}
    masks = full(weights)
    assert pruned(weights, masks, 1)["a"] is not masks["a"]
    assert masks["a"].all()


class TestHowMany:
    def test_lenet_300_100(self):
        """ceil(0.2 n) of 266,200 in each round: 10.7 % are left after ten, 8.6 % after eleven."""
        remaining, left = 266_200, []
        for _ in range(11):
            remaining -= to_prune(0.2, remaining)
            left.append(remaining)
        assert left[:5] == [212_960, 170_368, 136_294, 109_035, 87_228]
        assert left[9:] == [28_582, 22_865]

    @pytest.mark.parametrize(("share", "remaining", "count"), [(0.07, 100, 7), (0.1, 30, 3), (0.2, 11, 3)])
    def test_the_share_is_a_decimal_number(self, share, remaining, count):
        assert math.ceil(0.07 * 100) == 8
        assert to_prune(share, remaining) == count

    @given(share=st.floats(1e-9, 1 - 1e-9), remaining=st.integers(1, 10**12))
    def test_it_is_rounded_up(self, share, remaining):
        count = to_prune(share, remaining)
        assert 1 <= count <= remaining
        assert count - 1 < Fraction(repr(share)) * remaining <= count


class TestRefused:
    def test_a_layer_that_would_be_empty(self):
        weights = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([3.0, 4.0])}
        with pytest.raises(ValueError, match=r"a would have no connection left of 2.*exclude the layer"):
            pruned(weights, full(weights), 2)

    def test_weights_that_have_diverged(self):
        weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([float("nan"), 4.0])}
        with pytest.raises(ValueError, match="b has weights that are not finite"):
            pruned(weights, full(weights), 1)

    def test_a_mask_without_its_weight(self):
        with pytest.raises(ValueError, match="b has a mask and no weight among a"):
            pruned({"a": torch.ones(2)}, {"b": torch.ones(2).bool()}, 1)
