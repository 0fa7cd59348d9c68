"""Dense initial weights, rescaled for what a mask leaves of the layer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_rigl.model.sparse_init import rescale, transposed_groups


def drawn_mask(shape, density, seed=0):
    """Not from the seed that draws weights: the two would be correlated."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1000 + seed)) < density


def twin(weight, mask, how, transposed=0):
    """Loops in float64: look at each weight, find its output neuron, count what else goes in there."""
    w, m = weight.detach().double().numpy(), mask.numpy()
    result = np.zeros(w.shape)
    if how == "layer":
        for at in np.ndindex(*w.shape):
            result[at] = w[at] * np.sqrt(w.size / m.sum()) if m[at] else 0.0
        return result
    per_group = w.shape[0] // max(transposed, 1)

    def neuron(at):
        return (at[0] // per_group, at[1]) if transposed else at[0]

    dense, active = {}, {}
    for at in np.ndindex(*w.shape):
        dense[neuron(at)] = dense.get(neuron(at), 0) + 1
        active[neuron(at)] = active.get(neuron(at), 0) + int(m[at])
    for at in np.ndindex(*w.shape):
        result[at] = w[at] * np.sqrt(dense[neuron(at)] / active[neuron(at)]) if m[at] else 0.0
    return result


def test_two_neurons_by_hand():
    """Four inputs; the first neuron keeps one connection, the second all: 5 of 8 are active."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False], [True, True, True, True]])
    assert rescale(weight, mask, "neuron").tolist() == [[0, 4, 0, 0], [1, 2, 3, 4]]
    root = np.sqrt(8 / 5)
    assert rescale(weight, mask, "layer").tolist() == [
        [0, 2 * root, 0, 0],
        [root, 2 * root, 3 * root, 4 * root],
    ]


@st.composite
def layers(draw):
    """(shape, groups of a transposed convolution or 0)."""
    groups = draw(st.sampled_from([0, 0, 1, 2, 3]))
    kernel = (
        draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
        if not groups
        else draw(st.sampled_from([(3,), (2, 2)]))
    )
    return (draw(st.integers(1, 6)) * max(groups, 1), draw(st.integers(1, 6)), *kernel), groups


@given(layers(), st.floats(0, 1), st.sampled_from(["layer", "neuron"]), st.integers(0, 99))
def test_the_twin_agrees(layer, density, how, seed):
    shape, transposed = layer
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = drawn_mask(shape, density, seed + 1)
    result = rescale(weight, mask, how, transposed)
    if mask.any():
        np.testing.assert_allclose(result.numpy(), twin(weight, mask, how, transposed), rtol=1e-15, atol=0)
    assert (result[~mask] == 0).all()
    assert result.isfinite().all()


@pytest.mark.parametrize("how", ["layer", "neuron"])
def test_a_dense_layer_stays_as_it_is(how):
    weight = torch.randn(5, 7)
    result = rescale(weight, torch.ones(5, 7, dtype=torch.bool), how)
    assert torch.equal(result, weight)
    assert result.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("how", ["layer", "neuron"])
def test_without_connections_all_is_zero(how):
    result = rescale(torch.full((3, 4), torch.inf), torch.zeros(3, 4, dtype=torch.bool), how)
    assert torch.equal(result, torch.zeros(3, 4))


def test_a_neuron_without_inputs_keeps_its_zeros_and_does_not_touch_the_others():
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    result = rescale(torch.ones(3, 2, dtype=torch.float64), mask, "neuron")
    torch.testing.assert_close(result, torch.tensor([[2**0.5, 0], [0, 0], [1, 1]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["layer", "neuron"])
def test_the_result_is_rounded_once(dtype, how):
    weight = torch.randn(40, 30).to(dtype)
    mask = drawn_mask((40, 30), 0.2)
    result = rescale(weight, mask, how)
    assert result.dtype == dtype
    assert torch.equal(result, torch.from_numpy(twin(weight, mask, how)).to(dtype))


def test_nothing_is_changed_in_place_and_nothing_is_recorded():
    parameter = nn.Parameter(torch.randn(8, 6))
    before, mask = parameter.detach().clone(), drawn_mask((8, 6), 0.5)
    result = rescale(parameter, mask, "neuron")
    assert torch.equal(parameter, before)
    assert not result.requires_grad
    assert type(result) is torch.Tensor
    assert torch.equal(mask, drawn_mask((8, 6), 0.5))


def test_channels_last_stays():
    weight = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    mask = drawn_mask(weight.shape, 0.5)
    for how in ("layer", "neuron"):
        result = rescale(weight, mask, how)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, rescale(weight.contiguous(), mask, how))


# --- which dimension is the output: asked of the modules themselves ---

MODULES = {
    "linear": (lambda: nn.Linear(12, 6, bias=False), (12,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 3, 3)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, bias=False), (4, 3, 3)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(6, 4, 3, padding=1, groups=2, bias=False), (6, 3)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_connections_of_a_neuron_are_those_that_reach_its_output(kind):
    """A weight enters an output if the output's gradient with respect to it is not zero."""
    make, shape = MODULES[kind]
    module = make()
    groups = transposed_groups(module).get("weight", 0)
    weight, mask = module.weight.detach(), drawn_mask(module.weight.shape, 0.4, 3)
    result = rescale(weight, mask, "neuron", groups)
    y = module(torch.rand(1, *shape) + 1)
    for channel in range(y.shape[1]):
        (grad,) = torch.autograd.grad(y[0, channel].sum(), module.weight, retain_graph=True)
        enters = grad != 0
        root = (enters.sum().double() / (enters & mask).sum()).sqrt()
        assert torch.equal(result[enters & mask], (weight[enters & mask].double() * root).float())
        assert 0 < (enters & mask).sum() < enters.sum()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_each_gate_of_an_rnn_is_a_neuron(kind):
    module = getattr(nn, kind)(5, 4)
    for weight in (module.weight_ih_l0, module.weight_hh_l0):
        mask = drawn_mask(weight.shape, 0.5, 2)
        result = rescale(weight, mask, "neuron")
        for row in range(len(weight)):
            root = (weight.shape[1] / mask[row].sum().double()).sqrt() if mask[row].any() else 0.0
            assert torch.equal(result[row], (weight[row].detach().double() * mask[row] * root).float())


def test_the_groups_of_transposed_convolutions_are_found_under_their_clean_names():
    tied = nn.ConvTranspose3d(4, 4, 1)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 1, groups=2),
            "up": nn.ConvTranspose1d(4, 6, 2, groups=2),
            "one": tied,
            "two": tied,
        }
    )
    assert transposed_groups(model) == {"up.weight": 2, "one.weight": 1}
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), backend="eager"))
    assert transposed_groups(compiled) == {"0.0.weight": 1}


# --- expectation: the variance of the pre-activations is the dense layer's ---


def variance(weight, inputs=512):
    """Per neuron, over inputs of variance 1."""
    x = torch.randn(inputs, weight.shape[1], dtype=torch.float64)
    return (x @ weight.double().T).var(0)


@pytest.mark.parametrize("how", ["layer", "neuron"])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_the_variance_of_the_pre_activations_is_the_dense_layers(how, density):
    weight = torch.randn(1000, 1500) / 1500**0.5
    mask = drawn_mask(weight.shape, density)
    dense = variance(weight).mean()
    assert variance(rescale(weight, mask, how)).mean() / dense == pytest.approx(1, abs=0.04)
    assert variance(weight * mask).mean() / dense == pytest.approx(density, rel=0.1)  # what is repaired


def test_per_neuron_it_is_right_in_neurons_of_any_fan_in():
    """Half of the neurons keep 2 % of their inputs, half 50 %; per layer the first are too quiet."""
    weight = torch.randn(1000, 4000) / 4000**0.5
    mask = torch.cat([drawn_mask((500, 4000), 0.02, 1), drawn_mask((500, 4000), 0.5, 2)])
    by_neuron, by_layer = (variance(rescale(weight, mask, how)) for how in ("neuron", "layer"))
    assert by_neuron[:500].mean() == pytest.approx(1, abs=0.05)
    assert by_neuron[500:].mean() == pytest.approx(1, abs=0.05)
    assert by_layer[:500].mean() == pytest.approx(0.02 / 0.26, rel=0.1)
    assert by_layer.mean() == pytest.approx(1, abs=0.05)


def test_convolutions_keep_their_variance_too():
    conv = nn.Conv2d(64, 128, 3, bias=False)
    up = nn.ConvTranspose2d(64, 64, 3, bias=False, groups=2)
    x = torch.randn(16, 64, 12, 12)
    for module in (conv, up):
        dense = module(x)[:, :, 3:-3, 3:-3].var().item()
        mask = drawn_mask(module.weight.shape, 0.1)
        for how in ("layer", "neuron"):
            sparse = type(module)(64, module.out_channels, 3, bias=False, groups=module.groups)
            groups = transposed_groups(module).get("weight", 0)
            sparse.weight.data.copy_(rescale(module.weight, mask, how, groups))
            assert sparse(x)[:, :, 3:-3, 3:-3].var().item() / dense == pytest.approx(1, abs=0.05)


def test_glorot_becomes_glorot_with_the_fans_that_are_left():
    """Uniform with the limit sqrt(6 / (active / fan_out + active / fan_in)), the official code's draw."""
    weight = nn.init.xavier_uniform_(torch.empty(300, 200))
    mask = drawn_mask(weight.shape, 0.25)
    active = int(mask.sum())
    limit = (6 / (active / 300 + active / 200)) ** 0.5
    largest = rescale(weight, mask, "layer").abs().max().item()
    assert 0.999 * limit < largest <= limit * (1 + 1e-6)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2, 2), torch.ones(2, 3).bool(), "layer"),
            ValueError,
            r"is \(2, 2\) and its mask \(2, 3\)",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), "layer"),
            TypeError,
            "bool mask, got torch.float32 and torch.fl",
        ),
        ((torch.ones(2, 2).int(), torch.ones(2, 2).bool(), "layer"), TypeError, "floating weight"),
        ((torch.ones(2, 2), torch.ones(2, 2).bool(), "row"), ValueError, "one of layer, neuron, got 'row'"),
        (
            (torch.ones(2), torch.ones(2).bool(), "layer"),
            ValueError,
            r"outputs and one of inputs, got \(2,\)",
        ),
        (
            (torch.ones(4, 2, 1), torch.ones(4, 2, 1).bool(), "neuron", 3),
            ValueError,
            "do not divide 4 inputs",
        ),
        (
            (torch.ones(4, 2, 1), torch.ones(4, 2, 1).bool(), "neuron", -2),
            ValueError,
            "do not divide 4 inputs",
        ),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rescale(*arguments)
