"""One count for several layers: what each loses is what a sorted list of all says."""

import pytest
import torch

from lightning_rigl.topology import selection
from lightning_rigl.topology.overall import drops, highest


def slow(scores, active, count):
    ranked = sorted(
        (-float(score.reshape(-1)[i]), place, i)
        for place, score in enumerate(scores)
        for i in range(score.numel())
        if active[place].reshape(-1)[i]
    )
    return [sum(place == lost for _, lost, _ in ranked[count:]) for place in range(len(scores))]


@pytest.mark.parametrize("seed", range(20))
def test_a_sorted_list(seed):
    """With ties, within layers and between them, and high scores of inactive connections."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (7,), (2, 2, 2), (1,)]
    scores = [torch.randint(4, shape, generator=generator).float() for shape in shapes]
    active = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
    for score, mask in zip(scores, active, strict=True):
        score[~mask] += 9
    total = sum(int(mask.sum()) for mask in active)
    for count in range(total + 1):
        lost = drops(scores, active, count)
        assert lost == slow(scores, active, count)
        left = [selection.drop(s, m, n) for s, m, n in zip(scores, active, lost, strict=True)]
        assert sum(int(mask.sum()) for mask in left) == count


def test_fewer_connections_than_stay_lose_nothing():
    assert drops([torch.ones(3), torch.ones(2)], [torch.ones(3) > 0, torch.ones(2) > 2], 9) == [0, 0]
    assert drops([], [], 3) == []


def test_layers_of_different_types_are_ranked_by_their_values():
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0 + 1e-12], dtype=torch.float64)]
    assert drops(scores, [s > 0 for s in scores], 3) == [1, 0]


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="-1"):
        drops([torch.ones(3)], [torch.ones(3) > 0], -1)


def test_the_highest_of_all_layers_are_a_mask_of_each():
    scores = [torch.tensor([0.9, 0.1, 0.5]), torch.tensor([[0.7], [0.2]])]
    among = [torch.ones(3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)]
    assert [mask.tolist() for mask in highest(scores, among, 2)] == [[True, False, False], [[True], [False]]]
    assert highest([], [], 0) == []
    with pytest.raises(ValueError, match="asked to select 6 of 5"):
        highest(scores, among, 6)
