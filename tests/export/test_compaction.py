"""`compact`: fewer units, the same outputs."""

import copy
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.export.compaction import compact
from tests.export.compact_networks import KINDS, convolutional, cut


def shapes(model):
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def mlp(*widths):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def assert_same(small, model, *inputs):
    with torch.no_grad():
        expected, got = model.eval()(*inputs), small(*inputs)
    assert expected.dtype == got.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[expected.dtype]
    assert (expected - got).abs().max() <= tolerance * max(1, expected.abs().max().item())


def test_the_worked_example():
    #  x0 --1-- h0 ---2--- y0        h0 lives
    #  x1 --3-- h1                   h1 is read by no one, and then x1 neither
    #           h2 ---5--- y1        h2 = ReLU(7) reads nothing: 5 * 7 goes into the bias of y1
    #  x2 --4-- h3 ---6--- y1        h3 lives
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 4]]))
        model[0].bias.copy_(torch.tensor([0.0, 0, 7, 1]))
        model[2].weight.copy_(torch.tensor([[2.0, 0, 0, 0], [0, 0, 5, 6]]))
        model[2].bias.copy_(torch.tensor([10.0, 20]))
    small = compact(model, torch.zeros(1, 3))
    assert small.get_submodule("0_inputs").kept.tolist() == [0, 2]
    assert torch.equal(small.get_parameter("0.weight"), torch.tensor([[1.0, 0], [0, 4]]))
    assert torch.equal(small.get_parameter("0.bias"), torch.tensor([0.0, 1]))
    assert torch.equal(small.get_parameter("2.weight"), torch.tensor([[2.0, 0], [0, 6]]))
    assert torch.equal(small.get_parameter("2.bias"), torch.tensor([10.0, 55]))
    assert {name: kept.tolist() for name, kept in small.report.kept_inputs.items()} == {"0": [0, 2]}
    assert_same(small, model, torch.randn(5, 3))


def test_the_example_of_the_paper():
    """784-300-100 at 99 % and 89 % ends as 408-100-69 with 12.6 KFLOPs (appendix B, table 2)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *mlp(784, 300, 100, 10))
    inputs, first, second = (
        torch.randperm(n, generator=generator)[:k] for n, k in ((784, 408), (300, 100), (100, 69))
    )
    with torch.no_grad():
        for layer, rows, columns, active in (
            (model[1], first, inputs, 2352),
            (model[3], second, first, 3249),
        ):
            mask = torch.zeros_like(layer.weight)
            count = max(len(rows), len(columns))  # every living unit has a connection
            mask[rows[torch.arange(count) % len(rows)], columns[torch.arange(count) % len(columns)]] = 1
            free = [(r, c) for r in rows.tolist() for c in columns.tolist() if not mask[r, c]]
            for i in torch.randperm(len(free), generator=generator)[: active - count].tolist():
                mask[free[i]] = 1
            layer.weight *= mask
            layer.bias[mask.sum(1) == 0] = -1  # a dead neuron says nothing
    small = compact(model, torch.zeros(1, 1, 28, 28))
    assert shapes(small) == [(100, 408), (69, 100), (10, 69)]
    active = sum(int((small.get_submodule(name).weight != 0).sum()) for name in ("1", "3", "5"))
    assert round(2 * active / 1000, 1) == 12.6
    assert 1 - active / (408 * 100 + 100 * 69 + 690) == pytest.approx(0.870, abs=5e-4)
    assert_same(small, model, torch.rand(7, 1, 28, 28))


def alive_by_paths(weights):
    """Per layer of units, those on a path from an input to an output; at least one."""
    matrices = [w.numpy() != 0 for w in weights]
    from_inputs = [np.ones(matrices[0].shape[1], bool)]
    for m in matrices:
        from_inputs.append((m & from_inputs[-1]).any(1))
    to_outputs = [from_inputs[-1] | True]
    for m, reached in zip(reversed(matrices), reversed(from_inputs[1:]), strict=True):
        to_outputs.insert(0, (m & (to_outputs[0] & (reached | (m is matrices[-1])))[:, None]).any(0))
    return [max(1, int((a & b).sum())) for a, b in zip(from_inputs[:-1], to_outputs[:-1], strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.integers(1, 9), min_size=3, max_size=5),
    density=st.floats(0.05, 0.9),
    seed=st.integers(0, 10**6),
    bias=st.booleans(),
)
def test_of_any_mlp_exactly_the_units_on_paths_are_left(widths, density, seed, bias):
    model = cut(mlp(*widths), density, seed, rows=0.1).double()
    if not bias:
        for layer in model[::2]:
            layer.bias = None
    weights = [layer.weight.detach() for layer in model[::2]]
    small = compact(model, torch.zeros(1, widths[0], dtype=torch.float64))
    assert [shape[1] for shape in shapes(small)] == alive_by_paths(weights)
    assert shapes(small)[-1][0] == widths[-1]
    assert_same(small, model, torch.randn(4, widths[0], dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5).filter(
        lambda kinds: kinds.count("resize") + kinds.count("transposed") < 3
    ),
    width=st.sampled_from([4, 8]),
    head=st.sampled_from(["pool", "flat"]),
    density=st.sampled_from([0.02, 0.1, 0.4]),
    seed=st.integers(0, 10**6),
)
def test_of_any_convolutional_network_the_outputs_are_equal(kinds, width, head, density, seed):
    model = cut(convolutional(kinds, width, head), density, seed).double()
    x = torch.randn(3, 3, 13, 13, dtype=torch.float64)
    try:
        model.eval()(x)
    except RuntimeError:
        return  # the image has become too small
    small = compact(model, x[:1])
    assert_same(small, model, x)
    assert small.report.parameters[1] <= small.report.parameters[0] + small_corrections(small)


def small_corrections(small):
    return sum(m.kernel.weight.numel() for m in small.modules() if type(m).__name__ == "ConstantChannels")


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_loses_units(kind):
    model = cut(convolutional(["norm", kind, "norm"], 16, "pool"), 0.08, seed=3).double()
    small = compact(model, torch.zeros(1, 3, 13, 13, dtype=torch.float64))
    assert_same(small, model, torch.randn(2, 3, 13, 13, dtype=torch.float64))
    before, after = small.report.before, small.report.after
    assert any(after[name].parameters < before[name].parameters for name in before)
    if kind != "group_norm":
        assert not small.report.left


def test_a_lenet_trained_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    for sparsity in (0.98, 0.99):
        torch.manual_seed(0)
        model = mlp(64, 300, 100, 10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        sparsifier = Sparsifier(model, sparsity, schedule=UpdateSchedule(every=10), seed=0)
        sparsifier.start(total_steps=100)
        for step in range(100):
            batch = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            sparsifier.before_step(optimizer, step)
            optimizer.step()
            sparsifier.after_step()
        small = compact(model, images[:1])
        assert_same(small, model, images)
        after, before = small.report.parameters[1], small.report.parameters[0]
        assert after < before / 2
        active = sum(int((m.weight != 0).sum()) for m in model if isinstance(m, nn.Linear))
        assert sum(int((m.weight != 0).sum()) for m in small.modules() if isinstance(m, nn.Linear)) <= active


def test_a_layer_without_connections():
    model = mlp(5, 6, 6, 2)
    with torch.no_grad():
        model[2].weight.zero_()
    small = compact(model, torch.zeros(1, 5))
    assert shapes(small) == [(1, 1), (1, 1), (2, 1)]  # every layer keeps one unit
    assert_same(small, model, torch.randn(4, 5))


def test_constant_channels_pass_a_padded_convolution_and_the_border_is_right():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1, stride=2)).double()
    with torch.no_grad():
        model[0].weight[2:] = 0
    small = compact(model, torch.zeros(1, 2, 5, 5).double())
    assert small.get_submodule("2").weight.shape == (4, 2, 3, 3)
    assert_same(small, model, torch.randn(3, 2, 9, 8).double())  # any size of image


def test_one_constant_channel_in_many_is_not_worth_a_pass_over_the_border():
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 4, 3, padding=1)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
    small = compact(model, torch.zeros(1, 2, 5, 5).double())
    assert shapes(small) == [(16, 2, 1, 1), (4, 16, 3, 3)]
    assert_same(small, model, torch.randn(3, 2, 9, 8).double())


def test_features_that_one_layer_does_not_read_are_left_out_where_that_pays():
    class Two(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.stem, self.norm = nn.Linear(4, 64), nn.LayerNorm(64)
            self.wide, self.narrow = nn.Linear(64, outputs), nn.Linear(64, outputs)

        def forward(self, x):
            x = self.norm(self.stem(x))
            return self.wide(x) + self.narrow(x)

    for outputs, read, inputs in ((256, 4, 4), (2, 56, 64)):
        model = Two(outputs)
        with torch.no_grad():
            model.narrow.weight[:, read:] = 0
        small = compact(model, torch.randn(1, 4))
        assert small.narrow.weight.shape == (outputs, inputs)
        assert not small.report.kept_inputs
        assert_same(small, model, torch.randn(3, 4))


def test_the_model_is_not_touched():
    model = cut(convolutional(["residual", "squeeze"], 8, "flat"), 0.1).train()
    example = torch.randn(1, 3, 13, 13)
    kept, state, rng = example.clone(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = compact(model, example)
    assert model.training
    assert not small.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(example, kept)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(0.5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_copies_and_pickles_run_and_have_the_report():
    model = cut(mlp(6, 20, 20, 3), 0.1)
    small = compact(model, torch.zeros(1, 6))
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert_same(twin, model, torch.randn(4, 6))
        assert str(twin.report) == str(small.report)
    assert {name for name, _ in small.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert type(next(iter(small.children()))).__module__.startswith("lightning_rigl.export.parts")


def test_half_precision():
    model = cut(mlp(16, 64, 64, 3), 0.1).bfloat16()
    small = compact(model, torch.randn(2, 16, dtype=torch.bfloat16))
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    assert small(x).dtype == torch.bfloat16
    assert (small(x) - model(x)).abs().max() <= 0.02 * model(x).abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    model = cut(convolutional(["padded", "residual", "squeeze"], 8, "flat"), 0.1).double().cuda().eval()
    small = compact(model, torch.randn(1, 3, 13, 13, device="cuda", dtype=torch.float64))
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"cuda"}
    x = torch.randn(4, 3, 13, 13, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "example", "error", "words"),
    [
        ("net", torch.zeros(1, 4), TypeError, "expected a torch.nn.Module, got str"),
        (
            mlp(4, 3, 2),
            torch.zeros(1, 5),
            ValueError,
            r"does not run on the example \(\(1, 5\) float32 on cpu\)",
        ),
        (mlp(4, 3, 2), (torch.zeros(1, 4),) * 2, ValueError, "does not run on the example"),
        (mlp(4, 3, 2), (), ValueError, "does not run on the example.*no tensor"),
        (mlp(4, 3, 2), torch.zeros(1, 4).double(), ValueError, "float64"),
        (mlp(4, 3, 2).to("meta"), torch.zeros(1, 4), ValueError, "0.weight has no dense values"),
        (nn.LazyLinear(3), torch.zeros(1, 4), ValueError, "weight has no dense values"),
    ],
)
def test_bad_input(model, example, error, words):
    with pytest.raises(error, match=words):
        compact(model, example)


def test_a_wrong_result_is_never_handed_out(monkeypatch):
    monkeypatch.setattr(
        "lightning_rigl.export.weights.folded", lambda layer, *_: torch.zeros(layer.out_features)
    )
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 5
    with pytest.raises(
        RuntimeError, match=r"Sequential: the compacted model differs by .* more than rounding"
    ):
        compact(model, torch.randn(1, 3))
