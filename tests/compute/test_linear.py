import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from lightning_rigl.compute.linear import SparseProduct, product_of


def layer(outputs, inputs, density, backend, seed=0, bias=True):
    """A sparse weight, its mask and its product; a bias."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(outputs, inputs, generator=g) < density
    weight = nn.Parameter(torch.randn(outputs, inputs, generator=g) * mask)
    return SparseProduct(weight, mask, backend), (
        nn.Parameter(torch.randn(outputs, generator=g)) if bias else None
    )


def passes(product, x, bias, dense):
    """Output and gradients of x, weight and bias, sparse or dense."""
    x = x.clone().requires_grad_()
    product.parameter.grad = None
    if bias is not None:
        bias.grad = None
    y = linear(x, product.parameter, bias) if dense else product_of(product, x, product.parameter, bias)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape))
    weight_grad = product.parameter.grad.clone()
    return y.detach(), x.grad, weight_grad, None if bias is None else bias.grad.clone()


def test_worked_example(backend):
    """Two of six connections: y = W x + b, dx = W^T g, dw = g x^T at the two places only."""
    mask = torch.tensor([[True, False, False], [False, False, True]])
    weight = nn.Parameter(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, -1.0]]))
    product, bias = SparseProduct(weight, mask, backend), torch.tensor([0.5, 0.0])
    x = torch.tensor([[1.0, 10.0, 3.0]], requires_grad=True)
    y = product(x, bias)
    assert y.tolist() == [[2.5, -3.0]]
    y.backward(torch.tensor([[1.0, 4.0]]))
    assert x.grad.tolist() == [[2.0, 0.0, -4.0]]
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 12.0]]


@settings(deadline=None, max_examples=40)
@given(
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    batch=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", ["torch", "native"])
def test_it_is_the_dense_product_of_the_masked_weight(name, outputs, inputs, batch, density, bias, seed):
    product, b = layer(outputs, inputs, density, name, seed, bias)
    x = torch.randn(*batch, inputs, generator=torch.Generator().manual_seed(seed))
    found, dense = passes(product, x, b, dense=False), passes(product, x, b, dense=True)
    mask = product.parameter.detach() != 0
    torch.testing.assert_close(found[0], dense[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], dense[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], dense[2] * mask, atol=1e-4, rtol=1e-4)
    if bias:
        torch.testing.assert_close(found[3], dense[3], atol=1e-4, rtol=1e-4)


def test_against_numpy(backend):
    """The definition, connection by connection, in double precision."""
    product, bias = layer(7, 11, 0.4, backend)
    x = torch.randn(5, 11)
    y, dx, dw, _ = passes(product, x, bias, dense=False)
    w, a = product.parameter.detach().double().numpy(), x.double().numpy()
    g = np.sin(np.arange(35)).reshape(5, 7)
    expected_y, expected_dx, expected_dw = np.tile(bias.detach().double().numpy(), (5, 1)), 0 * a, 0 * w
    for o, i in zip(*np.nonzero(w), strict=True):
        for n in range(5):
            expected_y[n, o] += w[o, i] * a[n, i]
            expected_dx[n, i] += w[o, i] * g[n, o]
            expected_dw[o, i] += g[n, o] * a[n, i]
    np.testing.assert_allclose(y.numpy(), expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.numpy(), expected_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw.numpy(), expected_dw, rtol=1e-5, atol=1e-5)


def test_the_dense_gradient_on_request(backend):
    product, bias = layer(9, 6, 0.3, backend)
    x = torch.randn(4, 6)
    dense = passes(product, x, bias, dense=True)[2]
    product.dense_gradient = True
    torch.testing.assert_close(passes(product, x, bias, dense=False)[2], dense)
    assert not product.partial
    product.dense_gradient = False
    passes(product, x, bias, dense=False)
    assert product.partial


def test_values_are_read_again_when_the_weight_has_changed(backend):
    product, bias = layer(9, 6, 0.5, backend)
    x = torch.randn(4, 6)
    passes(product, x, bias, dense=False)
    with torch.no_grad():
        product.parameter.mul_(2)
    torch.testing.assert_close(product(x, bias), linear(x, product.parameter, bias))
    product.parameter.data = product.parameter.data * 2  # another memory
    torch.testing.assert_close(product(x, bias), linear(x, product.parameter, bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_the_dense_product(backend, value):
    """0 x inf is nan: an inactive weight passes it on."""
    product, bias = layer(9, 6, 0.3, backend)
    x = torch.randn(4, 6)
    x[1, 2] = value
    found, dense = passes(product, x, bias, dense=False), passes(product, x, bias, dense=True)
    assert found[0].isnan().tolist() == dense[0].isnan().tolist()
    g = torch.ones(4, 9)
    g[2, 3] = value
    results = []
    for y_of in (product, lambda x, b: linear(x, product.parameter, b)):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y_of(x, bias).backward(g)
        results.append(x.grad.isnan())
    assert torch.equal(*results)


def test_the_gradients_memory_is_used_again_once_nobody_holds_it(backend):
    product, bias = layer(9, 6, 0.5, backend)
    weight, x = product.parameter, torch.randn(4, 6)
    product(x, bias).sum().backward()
    first, place = weight.grad, weight.grad.data_ptr()
    assert product.wrote(first)
    kept = first.clone()
    weight.grad = None
    product(2 * x, bias).sum().backward()
    assert weight.grad.data_ptr() != place, "somebody still holds the first gradient"
    assert torch.equal(first, kept)
    del first
    weight.grad = None
    product(x, bias).sum().backward()
    assert weight.grad.data_ptr() == place
    torch.testing.assert_close(weight.grad, kept)


def test_a_gradient_that_was_written_to_is_cleaned_before_its_memory_is_used_again(backend):
    product, bias = layer(9, 6, 0.3, backend)
    weight, x = product.parameter, torch.randn(4, 6)
    product(x, bias).sum().backward()
    expected = weight.grad.clone()
    weight.grad.add_(1)
    assert not product.wrote(weight.grad)
    weight.grad = None
    product(x, bias).sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    assert product.wrote(weight.grad)


def test_gradients_of_several_passes_add_up(backend):
    product, bias = layer(9, 6, 0.5, backend)
    a, b = torch.randn(4, 6), torch.randn(3, 6)
    total = torch.zeros_like(product.parameter)
    for x in (a, b):
        product.parameter.grad = None
        product(x, bias).sum().backward()
        total += product.parameter.grad
    product.parameter.grad = None
    for x in (a, b):
        product(x, bias).sum().backward()
    torch.testing.assert_close(product.parameter.grad, total)
    product.parameter.grad = None
    (product(a, bias).sum() + product(b, bias).sum()).backward()
    torch.testing.assert_close(product.parameter.grad, total)


def test_frozen_weight_and_input_without_gradient(backend):
    product, bias = layer(9, 6, 0.5, backend)
    product.parameter.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    product(x, bias).sum().backward()
    assert product.parameter.grad is None
    torch.testing.assert_close(x.grad, product.parameter.sum(0).expand(4, 6))


def test_a_gradient_of_a_gradient(backend):
    """As a gradient penalty needs it: computed densely, but for what earlier passes left out."""
    product, bias = layer(9, 6, 0.5, backend)
    mask = product.parameter.detach() != 0
    penalties = []
    for y_of in (product, lambda x, b: linear(x, product.parameter, b)):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (dx,) = torch.autograd.grad(y_of(x, bias).square().sum(), x, create_graph=True)
        product.parameter.grad = None
        dx.square().sum().backward()
        penalties.append(product.parameter.grad * mask)
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize(
    "x", [torch.randn(0, 6), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, device="meta")]
)
def test_what_does_not_fit_is_left_to_the_dense_product(backend, x):
    product, _ = layer(9, 6, 0.5, backend)
    assert not product.fits(x, product.parameter)


def test_autocast_and_functional_transforms_are_dense(backend):
    product, _ = layer(9, 6, 0.5, backend, bias=False)
    weight, x = product.parameter, torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert product_of(product, x, weight, None).dtype == torch.bfloat16
    rows = torch.func.vmap(lambda row: product_of(product, row, weight, None))(x)
    torch.testing.assert_close(rows, linear(x, weight))


def test_strides_of_any_kind(backend):
    product, bias = layer(9, 6, 0.5, backend)
    for x in (torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.randn(1, 6).expand(4, 6)):
        torch.testing.assert_close(product(x, bias), linear(x, product.parameter, bias))
    x = torch.randn(4, 6, requires_grad=True)
    product(x, bias).sum().backward()  # its gradient is expanded from one number
    assert torch.allclose(x.grad, product.parameter.sum(0).expand(4, 6), atol=1e-6)


def test_a_copy_has_no_product(backend):
    product, _ = layer(9, 6, 0.5, backend)
    assert copy.deepcopy(product) is None
    assert pickle.loads(pickle.dumps(product)) is None


def test_it_is_deterministic(backend):
    product, bias = layer(64, 96, 0.2, backend)
    x = torch.randn(33, 96)
    first = passes(product, x, bias, dense=False)
    assert all(torch.equal(a, b) for a, b in zip(first, passes(product, x, bias, dense=False), strict=True))
