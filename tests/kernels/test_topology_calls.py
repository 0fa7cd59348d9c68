"""Native selection, index structures and bit masks: bit for bit what the torch ones give."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rigl.kernels import topology_calls as calls
from lightning_rigl.topology import bits, selection

MANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAN, INF = float("nan"), float("inf")
NEGATIVE_NAN = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)  # a nan with its sign bit set


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@st.composite
def small_problems(draw):
    size = draw(st.integers(1, 200))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, -NAN, 1e-40, -1e-40])
    scores = draw(st.lists(st.one_of(few, st.floats(width=32)), min_size=size, max_size=size))
    among = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(scores), draw(st.integers(0, sum(among))), torch.tensor(among)


@MANY
@given(small_problems())
def test_small_layers_equal_selection(kernels, problem):
    assert torch.equal(calls.top(kernels, *problem), selection.top(*problem))


def normal(size, random):
    return torch.randn(size, generator=random)


def with_nans(size, random):
    scores = normal(size, random)
    scores[torch.rand(size, generator=random) < 0.2] = NAN
    scores[torch.rand(size, generator=random) < 0.2] = NEGATIVE_NAN
    scores[torch.rand(size, generator=random) < 0.1] = -INF
    return scores


KINDS = {
    "all different": normal,
    "a few values": lambda size, random: normal(size, random).round(),
    "all equal": lambda size, random: torch.full((size,), -2.5),
    "mostly -0.0, else 0.0 or more": lambda size, random: torch.where(
        torch.rand(size, generator=random) < 0.1, normal(size, random).abs(), -torch.zeros(size)
    ),
    "nans of both signs, infinities": with_nans,
    "ascending": lambda size, random: torch.arange(size).float(),
    "descending": lambda size, random: -torch.arange(size).float(),
    "the high ones together": lambda size, random: torch.cat(
        [normal(size - size // 50, random), 1e30 + 1e28 * normal(size // 50, random)]
    ),
    "an outlier each 128": lambda size, random: (
        torch.where(torch.arange(size) % 128 == 0, 1e3, 1.0) * normal(size, random)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [63, 64, 65, 8192, 8193, 20_001, 300_007])
def test_layers_of_all_sizes_and_distributions_equal_selection(kernels, threads, kind, size):
    random = torch.Generator().manual_seed(size)
    scores = KINDS[kind](size, random)
    for density in (0.05, 0.6, 1.0):
        among = torch.rand(size, generator=random) < density
        available = int(among.sum())
        for count in {
            0,
            min(1, available),
            available // 30,
            available * 7 // 10,
            max(available - 1, 0),
            available,
        }:
            found = calls.top(kernels, scores, count, among)
            assert torch.equal(found, selection.top(scores, count, among)), (density, count)


def test_the_worked_example(kernels):
    everything = torch.ones(6, dtype=torch.bool)
    chosen = calls.top(kernels, torch.tensor([1.0, NAN, 2.0, -NAN, INF, 2.0]), 4, everything)
    assert chosen.tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_any_layout(kernels, dtype):
    scores = torch.randn(40, 30).to(dtype).t()
    among = (torch.rand(40, 30) < 0.5).t()
    count = int(among.sum()) // 3
    assert torch.equal(calls.top(kernels, scores, count, among), selection.top(scores, count, among))


def by_hand(mask):
    rows = mask.reshape(len(mask), -1).numpy() if mask.numel() else np.zeros((len(mask), 0), dtype=bool)
    return np.concatenate([[0], rows.sum(1).cumsum()]), np.nonzero(rows)[1], rows


SHAPES = [
    (1, 1),
    (3, 5),
    (0, 4),
    (4, 0),
    (16, 64),
    (5, 65),
    (300, 784),
    (32, 3, 3, 3),
    (2, 65_535),
    (2, 65_536),
]
SHAPES += [(65_536, 2), (1000, 1000)]


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_transpose(kernels, threads, shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    starts, columns = calls.csr(kernels, mask)
    wanted_starts, wanted_columns, rows = by_hand(mask)
    assert starts.dtype == torch.int32
    assert starts.tolist() == wanted_starts.tolist()
    assert columns.dtype == (torch.int32 if rows.shape[1] >= 65_536 else torch.uint16)
    assert columns.tolist() == wanted_columns.tolist()
    starts_t, columns_t, permutation = calls.transpose(kernels, starts, columns, rows.shape[1])
    wanted_starts_t = np.concatenate([[0], rows.T.sum(1).cumsum()])
    assert starts_t.tolist() == wanted_starts_t.tolist()
    assert columns_t.dtype == (torch.int32 if len(rows) >= 65_536 else torch.uint16)
    assert columns_t.tolist() == np.nonzero(rows.T)[1].tolist()
    number = np.zeros(rows.shape, dtype=np.int64)
    number[rows] = np.arange(rows.sum())
    assert permutation.tolist() == number.T[rows.T].tolist()


@pytest.mark.parametrize("shape", [(0, 4), (7, 9), (300, 784), (2, 70_000), (2000, 50)])
def test_carried_numbers_stay_with_their_connections(kernels, threads, shape):
    torch.manual_seed(0)
    old, new = torch.rand(shape) < 0.2, torch.rand(shape) < 0.2
    values = torch.randn(int(old.sum()))
    dense = torch.zeros(shape)
    dense[old] = values
    structures = calls.csr(kernels, old), calls.csr(kernels, new)
    assert torch.equal(calls.carry(kernels, values, shape[1], *structures), dense[new])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 1000, 100_001])
def test_bits_are_those_of_the_checkpoints_and_mask_like_where(kernels, threads, size):
    random = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=random) < 0.3
    packed = calls.pack_bits(kernels, mask)
    assert torch.equal(packed, bits.pack(mask))
    values = with_nans(size, random)
    wanted = torch.where(mask, values, 0.0)
    version = values._version
    calls.and_bits(kernels, values, packed)
    assert torch.equal(values.view(torch.int32), wanted.view(torch.int32))  # no nan, no -0.0 is left
    assert values._version > version


def test_bad_input_is_refused(kernels):
    scores, among = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True])
    for count in (-1, 3):
        with pytest.raises(ValueError, match=f"asked to select {count} of 2 candidates"):
            calls.top(kernels, scores, count, among)
    with pytest.raises(TypeError, match="float64"):
        calls.top(kernels, scores.double(), 1, among)
    with pytest.raises(TypeError, match=r"among is torch\.uint8"):
        calls.top(kernels, scores, 1, among.byte())
    with pytest.raises(ValueError, match=r"among has shape \(2,\)"):
        calls.top(kernels, scores, 1, among[:2])
    with pytest.raises(TypeError, match=r"mask is torch\.float32"):
        calls.csr(kernels, scores)
    with pytest.raises(ValueError, match="no dimension"):
        calls.csr(kernels, torch.tensor(True))
    old, other = calls.csr(kernels, among.view(3, 1)), calls.csr(kernels, among.view(1, 3))
    with pytest.raises(ValueError, match="cannot be carried"):
        calls.carry(kernels, torch.zeros(2), 1, old, other)
    with pytest.raises(ValueError, match="cannot be carried"):
        calls.carry(kernels, torch.zeros(3), 1, old, old)
    with pytest.raises(TypeError, match="float64"):
        calls.carry(kernels, torch.zeros(2).double(), 1, old, old)
    with pytest.raises(TypeError, match=r"columns torch\.int64"):
        calls.transpose(kernels, old[0], old[1].long(), 1)
    with pytest.raises(TypeError, match="float64"):
        calls.and_bits(kernels, scores.double(), bits.pack(among))
    for values in (torch.zeros(9), torch.zeros(4, 2).t()):
        with pytest.raises(ValueError, match="do not mask values"):
            calls.and_bits(kernels, values, torch.zeros(1, dtype=torch.uint8))


def test_what_suits():
    assert calls.suits(torch.zeros(1))
    assert calls.suits(torch.zeros(1, dtype=torch.bfloat16))
    assert not calls.suits(torch.zeros(1, dtype=torch.float64))
    assert not calls.suits(torch.zeros(1, device="meta"))
