"""Tensors that begin anywhere in memory, as views of a flat vector do."""

import pytest
import torch

from lightning_rigl.kernels import layer_calls, library, product_calls, step_calls, topology_calls

kernels = library.load()
pytestmark = pytest.mark.skipif(kernels is None, reason=f"no native kernels: {library.why_not()}")
OUTPUTS, INPUTS, BATCH = 37, 150, 45


def shifted(tensor, offset):
    """The same numbers, ``offset`` elements behind an aligned place."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    memory[offset:] = tensor.reshape(-1)
    return memory[offset:].view(tensor.shape)


@pytest.fixture(params=[1, 2, 3, 5, 7, 15])
def at(request):
    torch.manual_seed(0)
    return lambda tensor: shifted(tensor, request.param)


def test_masks_and_selection(at):
    scores, mask = torch.randn(OUTPUTS, INPUTS), torch.rand(OUTPUTS, INPUTS) < 0.5
    bits = topology_calls.pack_bits(kernels, mask)
    assert torch.equal(topology_calls.pack_bits(kernels, at(mask)), bits)
    values = at(scores)
    topology_calls.and_bits(kernels, values, at(bits))
    assert torch.equal(values, scores * mask)
    chosen = topology_calls.top(kernels, scores, 100, mask)
    assert torch.equal(topology_calls.top(kernels, at(scores), 100, at(mask)), chosen)


def test_products(at):
    mask = torch.rand(OUTPUTS, INPUTS) < 0.2
    weight, bias = torch.randn(OUTPUTS, INPUTS) * mask, torch.randn(OUTPUTS)
    x, grad = torch.randn(BATCH, INPUTS), torch.randn(BATCH, OUTPUTS)
    starts, columns = topology_calls.csr(kernels, mask)
    rest = topology_calls.transpose(kernels, starts, columns, INPUTS)
    indices = [at(t) for t in (starts, columns, *rest)]
    y, panels, values = layer_calls.forward(kernels, at(x), at(weight), at(bias), indices[0], indices[1])
    torch.testing.assert_close(y, x @ weight.t() + bias, atol=1e-4, rtol=1e-4)
    into = at(torch.zeros(OUTPUTS, INPUTS))
    dx, _ = layer_calls.backward(kernels, at(grad), at(panels), at(values), indices, (True, True), into)
    torch.testing.assert_close(dx, grad @ weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(into, (grad.t() @ x) * mask, atol=1e-4, rtol=1e-4)
    one = product_calls.linear(kernels, at(x[:1]), indices[0], indices[1], at(values), at(bias))
    torch.testing.assert_close(one, y[:1], atol=1e-4, rtol=1e-4)
    image = torch.randn(2, INPUTS, 3, 3)
    found = product_calls.conv1x1(kernels, at(image), indices[0], indices[1], at(values), at(bias))
    expected = torch.nn.functional.conv2d(image, weight[:, :, None, None], bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_steps(at):
    mask = torch.rand(OUTPUTS, INPUTS) < 0.2
    rows = topology_calls.csr(kernels, mask)
    count = len(rows[1])
    weight, grad = torch.randn(OUTPUTS, INPUTS) * mask, torch.randn(OUTPUTS, INPUTS) * mask
    results = []
    for place in (torch.clone, at):
        w, v, m, s = (place(t) for t in (weight, *torch.zeros(3, count)))
        step_calls.sgd(kernels, w, place(grad), v, rows, lr=0.1, momentum=0.9)
        step_calls.adam(kernels, w, place(grad), (m, s), rows, step=1, lr=0.1)
        results.append((w, v, m, s))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
