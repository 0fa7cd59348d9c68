"""Averages of gradients, by hand."""

import torch

from lightning_rigl.topology.averages import mean_magnitude, moving_average


def test_a_moving_average_begins_at_zero_and_leaves_the_old_one_alone():
    old = torch.tensor([1.0, 2.0])
    assert moving_average(old, torch.tensor([3.0, 6.0]), 0.75).tolist() == [1.5, 3.0]
    assert old.tolist() == [1.0, 2.0]
    assert moving_average(None, torch.tensor([4.0]), 0.75).tolist() == [1.0]


def test_what_is_not_finite_is_left_out_whole():
    old = torch.tensor([1.0, 2.0])
    for bad in ("nan", "inf", "-inf"):
        assert torch.equal(moving_average(old, torch.tensor([float(bad), 1.0]), 0.75), old)
    assert moving_average(None, torch.tensor([float("inf")]), 0.5).tolist() == [0.0]


def test_a_mean_is_that_of_the_chosen():
    assert mean_magnitude(torch.tensor([1.0, -3.0, 100.0]), torch.tensor([True, True, False])) == 2.0
    assert mean_magnitude(None, torch.tensor([True])) == 0
    assert mean_magnitude(torch.tensor([1.0]), torch.tensor([False])) == 0


def test_a_mean_of_many_half_numbers_is_summed_in_double():
    assert abs(mean_magnitude(torch.full((100_000,), 0.1), torch.ones(100_000).bool()) - 0.1) < 1e-8
