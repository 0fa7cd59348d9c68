"""Masks as bits: packed for a checkpoint, and as integers that an AND applies to a float."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl.kernels import library
from lightning_rigl.topology import bits


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_unpack_undoes_pack(values):
    mask = torch.tensor(values)
    packed = bits.pack(mask)
    assert packed.numel() == -(-len(values) // 8)
    assert torch.equal(bits.unpack(packed, mask.shape), mask)


def test_bytes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(ValueError, match="do not hold a mask of shape"):
        bits.unpack(bits.pack(torch.ones(8, dtype=torch.bool)), (3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_and_leaves_active_values_bitwise_and_makes_all_others_plus_zero(dtype):
    values = torch.tensor([1.5, -2.5, float("nan"), -0.0, float("-inf"), float("nan")], dtype=dtype)
    mask = torch.tensor([True, False, False, False, False, True])
    bits.and_(values, bits.integer_mask(mask, values))
    assert values[:5].tolist() == [1.5, 0, 0, 0, 0]
    assert not values[:5].signbit().any()
    assert values[5].isnan()


def test_the_integer_mask_has_the_layout_of_the_weight():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    integers = bits.integer_mask(weight > 0, weight)
    assert integers.stride() == weight.stride()
    expected = torch.where(weight > 0, weight, 0.0)
    bits.and_(weight, integers)
    assert torch.equal(weight, expected)


@pytest.fixture(params=["integers", "bits"])
def form(request, monkeypatch):
    """Without native kernels, and with them."""
    if request.param == "bits" and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    monkeypatch.setattr(library, "loaded", library.load if request.param == "bits" else lambda: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded weight"])
def test_an_applied_mask_zeroes_inactive_values_whatever_they_are(form, dtype, layout):
    weight = torch.randn(5, 7, dtype=dtype)
    like = weight.t() if layout == "transposed" else weight
    mask = torch.rand(like.shape) < 0.5
    applied = bits.AppliedMask(mask, like)
    for renewed in (mask, ~mask):
        values = torch.randn(like.shape, dtype=dtype)
        values[0, 0] = float("nan")
        values = values.t().contiguous().t() if layout != "plain" else values
        expected = torch.where(renewed, values, torch.zeros((), dtype=dtype))
        applied.renew(renewed)
        applied.zero(values)
        assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert not values[~renewed].signbit().any()
    assert applied.fits(values)
    assert not applied.fits(values.to(torch.complex64 if dtype == torch.float16 else torch.float16))
