import pytest
import torch
from torch import nn

from lightning_rigl.export.two_four import is_two_four, semi_structured, unfit

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def two_four(outputs, inputs, dtype=torch.float16):
    kept = torch.rand(outputs, inputs // 4, 4).argsort(-1) < 2
    return (torch.randn(outputs, inputs) * kept.view(outputs, inputs)).to(dtype)


@pytest.mark.parametrize(
    ("weights", "right"),
    [
        ([1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0], True),
        ([0.0] * 8, True),
        ([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], False),
        ([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], False),  # ten inputs are no fours
        ([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], True),  # three in a row, in two fours
        ([1.0, float("nan"), float("inf"), 0.0], False),
    ],
)
def test_two_of_each_four_consecutive_inputs(weights, right):
    assert is_two_four(torch.tensor([weights])) is right


def test_all_rows_count():
    weight = two_four(32, 64)
    assert is_two_four(weight)
    weight[31, 60:63] = 1.0
    assert not is_two_four(weight)


def test_a_weight_that_fits():
    assert unfit(two_four(64, 128)) is None
    assert unfit(two_four(64, 128, torch.bfloat16)) is None


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (two_four(64, 128, torch.float32), r"torch.float32; float16 and bfloat16 can"),
        (two_four(48, 128), r"\(48, 128\), and 2:4 needs outputs and inputs that are multiples of 32 and 64"),
        (two_four(64, 96), r"\(64, 96\)"),
        (torch.empty(0, 64, dtype=torch.float16), r"\(0, 64\)"),
        (torch.ones(64, 128, dtype=torch.float16), "more than two of four"),
    ],
)
def test_what_does_not_fit_is_said(weight, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(unfit(weight))


def test_refused_where_there_is_no_cuda():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).half()
    model[0].weight.data = two_four(32, 64)
    with pytest.raises(ValueError, match=r"0: it is on cpu, and only CUDA devices have 2:4 instructions"):
        semi_structured(model)
    with pytest.raises(ValueError, match=r"cannot convert 0: it is on cpu"):
        semi_structured(model, names=["0"])


def test_a_name_that_is_no_linear_layer_is_refused():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    with pytest.raises(ValueError, match="1: no linear layer of the model, which has 0"):
        semi_structured(model, names=["1"])
    with pytest.raises(ValueError, match="no linear layer"):
        semi_structured(nn.ReLU())


def test_weights_that_are_not_the_layers_own_are_refused():
    attention = nn.MultiheadAttention(64, 1)
    with pytest.raises(ValueError, match="attention layer reads the weight itself"):
        semi_structured(attention)
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 32))
    with pytest.raises(ValueError, match="computed by a parametrization"):
        semi_structured(nn.Sequential(computed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [(1,), (7,), (64,), (2, 5)])
@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_the_outputs_are_those_of_the_dense_layers(dtype, batch, place):
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).to(place, dtype)
    model[0].weight.data = two_four(256, 128, dtype).to(place)
    fast = semi_structured(model)
    x = torch.randn(*batch, 128, device=place, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert "SemiStructured" in type(fast[0].weight.data).__name__
    assert type(model[0].weight.data) is torch.Tensor  # the model stays as it is
    assert fast[2].weight.equal(model[2].weight)


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_a_named_layer_that_does_not_fit_is_refused_and_nothing_changes(place):
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 10)).half().to(place)
    model[0].weight.data = two_four(256, 128).to(place)
    with pytest.raises(ValueError, match=r"1: its weight is \(10, 256\)"):
        semi_structured(model, names=["0", "1"])
    assert type(model[0].weight.data) is torch.Tensor
