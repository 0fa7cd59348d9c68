"""Products over active connections give what a dense product of the masked matrix gives, to rounding."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rigl.kernels import product_calls

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BATCHES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 97]


class Problem:
    """A random masked matrix W, its compressed rows by hand, and those of its transpose."""

    def __init__(self, outputs, inputs, sparsity, seed=0, wide=False):
        random = np.random.default_rng(seed)
        self.mask = random.random((outputs, inputs)) >= sparsity
        self.weight = np.where(self.mask, random.standard_normal((outputs, inputs)), 0).astype(np.float32)
        self.bias = torch.tensor(random.standard_normal(outputs), dtype=torch.float32)
        kind = torch.int32 if wide else torch.uint16
        self.starts, self.columns = compressed(self.mask, kind)
        self.values = torch.tensor(self.weight[self.mask])
        self.starts_t, self.columns_t = compressed(self.mask.T, kind)
        order = np.zeros(self.mask.shape, dtype=np.int32)
        order[self.mask] = np.arange(self.mask.sum())
        self.permutation = torch.tensor(order.T[self.mask.T], dtype=torch.int32)

    def rows(self):
        return self.starts, self.columns, self.values


def compressed(mask, kind):
    starts = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    return torch.tensor(starts), torch.tensor(np.nonzero(mask)[1].astype(np.int64)).to(kind)


def product(weight, x, bias=None):
    """The slow twin: a sum of float64 products for each output, connection by connection."""
    y = np.zeros((len(x), len(weight)))
    for output, row in enumerate(weight):
        for connection in np.flatnonzero(row):
            y[:, output] += np.float64(row[connection]) * x[:, connection]
    return y if bias is None else y + bias.double().numpy()


def close(found, wanted):
    wanted = torch.as_tensor(np.asarray(wanted), dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- worked example ---


def test_three_connections_by_hand(kernels):
    # W = [[0, 2, 0],   x = (1, 10, 100)   y = W x + b = (20 + 0.5, 3 + 400 + 0.25)
    #      [3, 0, 4]]
    starts, columns = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([1, 0, 2], dtype=torch.uint16)
    values, bias = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0.5, 0.25])
    x, grad = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([[5.0, 7.0]])
    assert product_calls.linear(kernels, x, starts, columns, values, bias).tolist() == [[20.5, 403.25]]
    panels = product_calls.pack(kernels, x)
    assert product_calls.spmm(kernels, panels, 1, starts, columns, values, None).tolist() == [[20.0, 403.0]]
    gradient = product_calls.sddmm(kernels, product_calls.pack(kernels, grad), panels, 1, starts, columns)
    assert gradient.tolist() == [5.0 * 10, 7.0 * 1, 7.0 * 100]


def test_a_panel_holds_32_examples_of_a_feature_side_by_side_and_zeros_past_the_batch(kernels):
    x = torch.arange(1.0, 71.0).view(35, 2)
    panels = product_calls.pack(kernels, x)
    assert panels.shape == (2, 2, 32)
    assert torch.equal(panels[0], x[:32].t())
    assert torch.equal(panels[1, :, :3], x[32:].t())
    assert not panels[1, :, 3:].any()


# --- properties ---


@FEW
@given(
    outputs=st.integers(0, 40),
    inputs=st.integers(0, 70),
    batch=st.sampled_from(BATCHES),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    wide=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_both_gradients_are_those_of_the_slow_twin(
    kernels, outputs, inputs, batch, sparsity, wide, biased, seed
):
    p = Problem(outputs, inputs, sparsity, seed, wide)
    x, grad, bias = torch.randn(batch, inputs), torch.randn(batch, outputs), p.bias if biased else None
    panels, grads = product_calls.pack(kernels, x), product_calls.pack(kernels, grad)
    wanted = product(p.weight, x.numpy(), bias)
    close(product_calls.spmm(kernels, panels, batch, *p.rows(), bias), wanted)
    close(product_calls.spmv(kernels, x, *p.rows(), bias), wanted)
    close(product_calls.linear(kernels, x, *p.rows(), bias), wanted)

    turned = product_calls.permute(kernels, p.values, p.permutation)
    assert np.array_equal(turned.numpy(), p.weight.T[p.mask.T])
    dx = product_calls.spmm(kernels, grads, batch, p.starts_t, p.columns_t, turned, None)
    close(dx, product(p.weight.T, grad.numpy()))

    into = torch.full((outputs, inputs), 7.0)
    dense = grad.double().t().numpy() @ x.double().numpy()
    close(product_calls.sddmm(kernels, grads, panels, batch, p.starts, p.columns, into), dense[p.mask])
    close(into, np.where(p.mask, dense, 7.0))


@pytest.mark.parametrize("inputs", [200, 2100])  # panels are taken in pairs, and one by one
@pytest.mark.parametrize("batch", [32, 65, 161])
def test_gradients_add_up_over_all_panels_of_a_large_batch(kernels, inputs, batch):
    p = Problem(40, inputs, 0.7)
    x, grad = torch.randn(batch, inputs), torch.randn(batch, 40)
    panels, grads = product_calls.pack(kernels, x), product_calls.pack(kernels, grad)
    dense = grad.double().t() @ x.double()
    found = product_calls.sddmm(kernels, grads, panels, batch, p.starts, p.columns)
    torch.testing.assert_close(found.double(), dense[torch.tensor(p.mask)], rtol=1e-5, atol=1e-4)
    y = product_calls.linear(kernels, x, *p.rows(), p.bias)
    wanted = x.double() @ torch.tensor(p.weight).double().t() + p.bias
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)


@FEW
@given(
    images=st.integers(0, 3),
    pixels=st.sampled_from([(0, 3), (1, 1), (3, 1), (2, 2), (4, 4), (7, 7), (8, 8), (5, 13), (12, 12)]),
    sparsity=st.sampled_from([0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_convolution_of_one_pixel_is_the_product_at_every_pixel(kernels, images, pixels, sparsity, seed):
    p = Problem(19, 23, sparsity, seed)
    x = torch.randn(images, 23, *pixels)
    y = product_calls.conv1x1(kernels, x, *p.rows(), p.bias)
    flat = x.flatten(2).transpose(1, 2).reshape(-1, 23).numpy()
    wanted = product(p.weight, flat, p.bias).reshape(images, *pixels, 19)
    close(y, wanted.transpose(0, 3, 1, 2))


def test_values_go_from_their_dense_places_and_back_and_nothing_else_is_touched(kernels):
    p = Problem(17, 33, 0.8)
    dense = torch.randn(17, 33)
    values = product_calls.gather(kernels, dense, p.starts, p.columns)
    assert torch.equal(values, dense[torch.tensor(p.mask)])
    into = torch.full((17, 33), 7.0)
    product_calls.scatter(kernels, values, p.starts, p.columns, into)
    assert torch.equal(into, torch.where(torch.tensor(p.mask), dense, 7.0))
    kernel = dense.view(17, 11, 3).permute(0, 1, 2)  # a weight of more dimensions is its rows
    assert torch.equal(product_calls.gather(kernels, kernel, p.starts, p.columns), values)


# --- layouts, determinism, numbers that are none ---


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_batch_may_have_any_strides(kernels, batch):
    p = Problem(21, 34, 0.7)
    plain = torch.randn(batch, 34)
    wanted = product_calls.linear(kernels, plain, *p.rows(), p.bias)
    layouts = {
        "feature by feature": plain.t().contiguous().t(),
        "a slice of wider rows": torch.cat([plain, plain], 1)[:, :34],
        "every second example and feature": plain.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
        "at an address of its own": torch.cat([torch.zeros(1), plain.flatten()])[1:].view(batch, 34),
    }
    for name, x in layouts.items():
        assert torch.equal(x, plain), name
        found = product_calls.linear(kernels, x, *p.rows(), p.bias)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        if batch > 1:
            assert torch.equal(found, wanted), name
    repeated = plain[:1].expand(batch, 34)
    close(product_calls.linear(kernels, repeated, *p.rows(), p.bias)[-1:], wanted[:1])


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("wide", [False, True])
def test_results_are_the_same_bits_for_any_number_of_threads(kernels, set_threads, wide):
    p, outcomes = Problem(150, 130, 0.6, wide=wide), []
    x, grad, image = torch.randn(97, 130), torch.randn(97, 150), torch.randn(2, 130, 9, 9)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        panels, grads = product_calls.pack(kernels, x), product_calls.pack(kernels, grad)
        turned = product_calls.permute(kernels, p.values, p.permutation)
        outcomes.append((
            panels,
            product_calls.spmm(kernels, panels, 97, *p.rows(), p.bias),
            product_calls.spmv(kernels, x, *p.rows(), p.bias),
            product_calls.spmm(kernels, grads, 97, p.starts_t, p.columns_t, turned, None),
            product_calls.sddmm(kernels, grads, panels, 97, p.starts, p.columns),
            product_calls.conv1x1(kernels, image, *p.rows(), p.bias),
        ))  # fmt: skip
    for outcome in outcomes[1:]:
        same = [torch.equal(first, other) for first, other in zip(outcomes[0], outcome, strict=True)]
        assert all(same), same


def test_rows_of_very_unequal_length_are_all_computed_by_any_number_of_threads(kernels, set_threads):
    p = Problem(200, 300, 0.999)
    full = np.zeros((200, 300), dtype=bool)
    full[3], full[199, 7] = True, True
    p.starts, p.columns = compressed(full, torch.uint16)
    p.values = torch.randn(int(full.sum()))
    dense = torch.zeros(200, 300)
    dense[torch.tensor(full)] = p.values
    x = torch.randn(130, 300)
    for threads in (1, 2, 5, 16):
        set_threads(threads)
        y = product_calls.linear(kernels, x, *p.rows(), None)
        torch.testing.assert_close(y, x @ dense.t(), rtol=1e-4, atol=1e-4)


def test_python_threads_may_multiply_at_the_same_time(kernels):
    p = Problem(64, 96, 0.5)
    batches = [torch.randn(40, 96) for _ in range(16)]
    wanted = [product_calls.linear(kernels, x, *p.rows(), p.bias) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: product_calls.linear(kernels, x, *p.rows(), p.bias), batches))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_an_odd_input_reaches_exactly_the_outputs_that_read_it(kernels, odd, batch):
    p = Problem(30, 40, 0.8)
    x = torch.randn(batch, 40)
    x[-1, 7] = odd
    y = product_calls.linear(kernels, x, *p.rows(), None)
    reached = torch.zeros(batch, 30, dtype=torch.bool)
    reached[-1] = torch.tensor(p.mask[:, 7])
    assert reached.any()
    assert torch.equal(~y.isfinite(), reached)
    signs = torch.tensor(p.weight[p.mask[:, 7], 7]).sign()
    torch.testing.assert_close(y[-1, reached[-1]], signs * odd, equal_nan=True)


def test_odd_numbers_in_weights_and_gradients_stay_where_they_belong(kernels):
    p = Problem(30, 40, 0.8)
    p.values[0] = float("inf")
    row = np.argwhere(p.mask)[0, 0]
    x, grad = torch.randn(5, 40).abs() + 0.1, torch.randn(5, 30)
    y = product_calls.linear(kernels, x, *p.rows(), None)
    assert (y[:, row] == float("inf")).all()
    assert y[:, np.arange(30) != row].isfinite().all()
    grad[2, row] = float("nan")
    panels, grads = product_calls.pack(kernels, x), product_calls.pack(kernels, grad)
    found = product_calls.sddmm(kernels, grads, panels, 5, p.starts, p.columns)
    assert np.array_equal(found.isnan().numpy(), np.argwhere(p.mask)[:, 0] == row)


def test_a_column_past_65535_takes_wide_indices(kernels):
    starts, columns = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 70_000], dtype=torch.int32)
    x = torch.zeros(3, 70_001)
    x[:, 1], x[:, 70_000] = 2.0, 5.0
    assert (
        product_calls.linear(kernels, x, starts, columns, torch.tensor([10.0, 1.0]), None).tolist()
        == [[25.0]] * 3
    )


def test_results_are_float32_on_the_cpu_whatever_torch_makes_by_default(kernels):
    p, x = Problem(4, 6, 0.0), torch.randn(3, 6)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = product_calls.linear(kernels, x, *p.rows(), None)
            panels = product_calls.pack(kernels, x)
            gradient = product_calls.sddmm(
                kernels, product_calls.pack(kernels, y), panels, 3, p.starts, p.columns
            )
            image = product_calls.conv1x1(kernels, x[:, :, None], *p.rows(), None)
            gathered = product_calls.gather(kernels, gradient.view(4, 6), p.starts, p.columns)
            turned = product_calls.permute(kernels, gathered, p.permutation)
    finally:
        torch.set_default_dtype(torch.float32)
    close(y, product(p.weight, x.numpy()))
    close(turned, (y.t() @ x).t().reshape(-1))
    close(image[:, :, 0], y)


# --- bad input ---


def test_other_types_are_refused_in_words(kernels):
    p = Problem(4, 6, 0.5)
    with pytest.raises(
        TypeError, match=r"x is torch.float64 on cpu; the kernels multiply float32 on the CPU"
    ):
        product_calls.linear(kernels, torch.randn(2, 6).double(), *p.rows(), None)
    with pytest.raises(TypeError, match=r"x is torch.float32 on meta"):
        product_calls.pack(kernels, torch.randn(2, 6, device="meta"))
    with pytest.raises(TypeError, match=r"bias is torch.bfloat16"):
        product_calls.linear(kernels, torch.randn(2, 6), *p.rows(), p.bias.bfloat16())
    with pytest.raises(TypeError, match=r"columns torch.int64; starts must be int32, columns uint16 or"):
        product_calls.linear(kernels, torch.randn(2, 6), p.starts, p.columns.long(), p.values, None)
    with pytest.raises(TypeError, match=r"starts are torch.int64 and columns torch.uint16"):
        product_calls.gather(kernels, torch.zeros(4, 6), p.starts.long(), p.columns)
    with pytest.raises(TypeError, match=r"starts and columns must be contiguous"):
        product_calls.gather(kernels, torch.zeros(4, 6), p.starts.repeat_interleave(2)[::2], p.columns)


def test_shapes_that_do_not_fit_are_refused_in_words(kernels):
    p, x = Problem(4, 6, 0.0), torch.randn(40, 6)
    panels = product_calls.pack(kernels, x)
    with pytest.raises(ValueError, match=r"x has shape \(6,\); it must have 2 dimension"):
        product_calls.pack(kernels, x[0])
    with pytest.raises(ValueError, match=r"bias has 3 elements, and W 4 outputs"):
        product_calls.linear(kernels, x, *p.rows(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"there are 23 values for 24 connections"):
        product_calls.linear(kernels, x, p.starts, p.columns, p.values[1:], None)
    with pytest.raises(ValueError, match=r"panels has shape \(2, 6, 32\); a batch of 65 makes \(3, 6, 32\)"):
        product_calls.spmm(kernels, panels, 65, *p.rows(), None)
    with pytest.raises(ValueError, match=r"gradient has panels of shape \(2, 6, 32\), and W 4 outputs"):
        product_calls.sddmm(kernels, panels, panels, 40, p.starts, p.columns)
    with pytest.raises(ValueError, match=r"dense has shape \(5, 6\), and W 4 outputs"):
        product_calls.gather(kernels, torch.zeros(5, 6), p.starts, p.columns)
    with pytest.raises(ValueError, match=r"it must be contiguous, 4 rows of 6"):
        product_calls.scatter(kernels, p.values, p.starts, p.columns, torch.zeros(6, 4).t())
    with pytest.raises(ValueError, match=r"permutation is torch.int64"):
        product_calls.permute(kernels, p.values, p.permutation.long())
    with pytest.raises(ValueError, match=r"it must have images, channels and pixels"):
        product_calls.conv1x1(kernels, x, *p.rows(), None)
