"""Shuffled masks: the same counts, other places."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl.model.mask_controls import shuffled


def masks():
    generator = torch.Generator().manual_seed(5)
    shapes = {"conv.weight": (8, 4, 3, 3), "fc.weight": (10, 30), "head.weight": (1, 3)}
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


def test_counts_shapes_and_the_argument_stay():
    given_masks, before = masks(), {name: mask.clone() for name, mask in masks().items()}
    control = shuffled(given_masks, seed=0)
    assert list(control) == list(before)
    for name, mask in control.items():
        assert (mask.shape, mask.dtype, int(mask.sum())) == (
            before[name].shape,
            torch.bool,
            int(before[name].sum()),
        )
        assert torch.equal(given_masks[name], before[name])


@given(size=st.integers(2, 5), active=st.integers(1, 4), seed=st.integers(0, 300))
def test_no_layer_stays_as_it_is(size, active, seed):
    """A shuffle that changes a copy nobody sees is the defect that this control has had elsewhere."""
    mask = torch.arange(size) < min(active, size - 1)
    control = shuffled({"a": mask}, seed)["a"]
    assert int(control.sum()) == int(mask.sum())
    assert not torch.equal(control, mask)


def test_full_and_empty_layers_are_copied():
    control = shuffled(full := {"a": torch.ones(2, 3).bool(), "b": torch.zeros(4).bool()}, seed=0)
    assert control["a"].all()
    assert not control["b"].any()
    assert all(control[name].data_ptr() != mask.data_ptr() for name, mask in full.items())


def test_the_seed_and_the_name_decide_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = (shuffled(masks(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    mask = masks()["fc.weight"]
    twins = shuffled({"a": mask, "b": mask}, 0)
    assert not torch.equal(twins["a"], twins["b"])


def test_every_place_is_as_likely():
    mask = torch.arange(4) == 0
    hits = sum(shuffled({"a": mask}, seed)["a"].int() for seed in range(900))
    assert hits[0] == 0  # that would be the mask itself
    assert hits[1:].tolist() == pytest.approx([300] * 3, abs=60)
