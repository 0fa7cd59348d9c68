import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rigl.compute import backends
from lightning_rigl.export import sparse_model as module
from lightning_rigl.export.sparse_layers import SparseConv1x1, SparseLinear
from lightning_rigl.export.sparse_model import sparse, sparse_report
from lightning_rigl.kernels import library


@pytest.fixture(params=["torch", "native"])
def backend(request):
    if request.param == "native" and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    return request.param


def cut(model, density=0.2, seed=0):
    """Random zeros in all weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand(p.shape, generator=generator) < density)
    return model


def mlp():
    return cut(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 40, bias=False), nn.Linear(40, 10)))


class Net(nn.Module):
    """Convolutions, norms and linear layers."""

    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.up = nn.BatchNorm2d(24), nn.Conv2d(24, 16, 1, bias=False)
        self.drop, self.head = nn.Dropout(), nn.Linear(16, 5)

    def forward(self, x):
        x = self.up(self.norm(self.mid(self.down(x).relu())).relu())
        return self.head(self.drop(x.mean((2, 3))))


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_worked_example(backend):
    #  [0 2 0]       [1  ]   [20 + 1]
    #  [0 0 0]   x   [10 ] = [     2]
    #  [3 0 4]       [100]   [403 + 3]
    layer = nn.Linear(3, 3)
    layer.weight.data = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    layer.bias.data = torch.tensor([1.0, 2.0, 3.0])
    fast = sparse(layer, backend, min_sparsity=0.5)
    assert fast.values.tolist() == [2.0, 3.0, 4.0]
    assert fast.starts.tolist() == [0, 1, 1, 3]
    assert fast.columns.to(torch.int64).tolist() == [1, 0, 2]
    assert fast.columns.dtype == (torch.int32 if backend == "torch" else torch.uint16)
    assert fast(torch.tensor([1.0, 10.0, 100.0])).tolist() == [21.0, 2.0, 406.0]
    assert fast.weight.equal(layer.weight)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    bias=st.booleans(),
    native=st.booleans(),
    turned=st.booleans(),
)
def test_a_linear_layer_of_any_batch_is_the_slow_product(
    shape, outputs, inputs, density, bias, native, turned
):
    layer = cut(nn.Linear(inputs, outputs, bias=bias), density)
    fast = sparse(layer, "native" if native and library.load() is not None else "torch", min_sparsity=0.0)
    x = torch.randn(inputs, *shape).movedim(0, -1) if turned else torch.randn(*shape, inputs)
    wanted = x.numpy() @ layer.weight.detach().numpy().T
    if bias:
        wanted = wanted + layer.bias.detach().numpy()
    with torch.no_grad():
        assert isinstance(fast, SparseLinear)
        np.testing.assert_allclose(fast(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    images=st.integers(0, 3),
    side=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    bias=st.booleans(),
    native=st.booleans(),
    last=st.booleans(),
)
def test_a_convolution_of_one_pixel_is_the_dense_one(kind, images, side, density, bias, native, last):
    layer = cut(kind(12, 20, 1, bias=bias), density)
    fast = sparse(layer, "native" if native and library.load() is not None else "torch", min_sparsity=0.0)
    spatial = [side, side + 1, 2][: layer.weight.dim() - 2]
    x = torch.randn(images, *spatial, 12).movedim(-1, 1) if last else torch.randn(images, 12, *spatial)
    with torch.no_grad():
        assert isinstance(fast, SparseConv1x1)
        got = fast(x)
        if images and side:
            close(got, layer(x))
            close(fast(x[0]), layer(x[0]))
        assert got.shape == (images, 20, *spatial)


def test_a_whole_network_in_evaluation_mode_and_the_original_as_it_was(backend):
    net = cut(Net()).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    fast, x = sparse(net, backend, min_sparsity=0.5), torch.randn(3, 8, 7, 9)
    kinds = {name: type(m).__name__ for name, m in fast.named_children()}
    replaced = {"down": "SparseConv1x1", "up": "SparseConv1x1", "head": "SparseLinear"}
    assert kinds == {"mid": "Conv2d", "norm": "BatchNorm2d", "drop": "Dropout", **replaced}
    assert type(fast) is Net
    assert not any(m.training for m in fast.modules())
    assert net.training
    assert type(net.head) is nn.Linear
    assert all(before[name].equal(t) for name, t in net.state_dict().items())
    close(fast(x), net.eval()(x))
    net.head.weight.data.zero_()
    assert fast.head.values.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_goes_through_as_in_a_dense_layer(backend, bad):
    for layer, x in (
        (nn.Linear(12, 20), torch.randn(4, 12)),
        (nn.Conv2d(12, 20, 1), torch.randn(2, 12, 3, 3)),
    ):
        fast = sparse(cut(layer), backend, min_sparsity=0.0)
        x[1, 3] = bad
        close_or_nan = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(fast(x), layer(x), **close_or_nan)
    layer = cut(nn.Linear(12, 20))
    layer.weight.data[2, 5] = bad  # a weight that is not finite is no zero
    torch.testing.assert_close(
        sparse(layer, backend, min_sparsity=0.0)(torch.ones(2, 12)), layer(torch.ones(2, 12)), equal_nan=True
    )


def test_the_input_gets_the_dense_gradient_and_the_weight_none(backend):
    net = cut(Net()).eval()
    fast = sparse(net, backend, min_sparsity=0.0)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    for model in (net, fast):
        model.zero_grad()
    (wanted,) = torch.autograd.grad(net(x).square().sum(), x)
    (got,) = torch.autograd.grad(fast(x).square().sum(), x)
    close(got, wanted)
    assert not fast.head.values.requires_grad
    fast.head.values.requires_grad_()
    with pytest.raises(RuntimeError, match="train the dense model"):
        fast(x).sum().backward()


def test_copies_pickles_and_state_dicts(backend):
    net, x = cut(Net()).eval(), torch.randn(2, 8, 5, 5)
    fast = sparse(net, backend, min_sparsity=0.5)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    other = sparse(net, backend, min_sparsity=0.5)
    for buffer in other.buffers():
        if buffer.is_floating_point():
            buffer.zero_()
    other.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), other):
        assert twin.head.columns.dtype == fast.head.columns.dtype
        assert twin(x).equal(fast(x))
        assert sparse_report(twin) == sparse_report(fast)
    assert "head.weight" not in fast.state_dict()


def test_a_state_of_another_mask_or_with_wrong_indices_is_refused(backend):
    layer = cut(nn.Linear(12, 20))
    fast = sparse(layer, backend, min_sparsity=0.0)
    state, before = fast.state_dict(), fast(torch.ones(12))
    with pytest.raises(RuntimeError, match="load into an export of the model that it comes from"):
        fast.load_state_dict(sparse(cut(nn.Linear(12, 20), 0.7), backend, min_sparsity=0.0).state_dict())
    with pytest.raises(RuntimeError, match="belong together"):
        fast.load_state_dict({"starts": state["starts"]}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})
    columns = state["columns"].to(torch.int32).clone()
    columns[0] = 12  # beyond the last input
    for wrong in ({"columns": columns}, {"starts": state["starts"].flip(0)}, {"starts": state["starts"] + 1}):
        with pytest.raises(RuntimeError, match="no compressed rows of 12 inputs"):
            fast.load_state_dict({**state, **wrong})
    assert fast(torch.ones(12)).equal(before)


def test_operators_are_what_torch_wants_of_them(backend):
    layer = sparse(cut(nn.Linear(12, 20)), backend, min_sparsity=0.0)
    rows = (layer.values, layer.starts, layer.columns, layer.bias, 12, backend)
    ops = torch.ops.lightning_rigl
    inputs = {"linear": torch.randn(2, 3, 12), "conv1x1": torch.randn(2, 12, 3, 5)}
    for name, x in inputs.items():
        torch.library.opcheck(getattr(ops, name).default, (x, *rows))
        torch.library.opcheck(getattr(ops, f"{name}_with_gradient").default, (x.requires_grad_(), *rows))
    torch.library.opcheck(ops.dense.default, (layer.values, layer.starts, layer.columns, 12))


def test_flops_are_those_of_the_connections(backend):
    layer = sparse(cut(nn.Linear(12, 20)), backend, min_sparsity=0.0)
    conv = sparse(cut(nn.Conv2d(12, 20, 1)), backend, min_sparsity=0.0)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 3, 12))
        conv(torch.randn(2, 12, 4, 5))
    assert counter.get_total_flops() == 2 * 6 * len(layer.values) + 2 * 40 * len(conv.values)


@pytest.mark.filterwarnings("ignore")
def test_compiled_as_one_graph_and_exported_with_a_free_batch(backend):
    net = mlp().eval()
    fast, x = sparse(net, backend, min_sparsity=0.0), torch.randn(6, 32)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    close(compiled(x), net(x))
    with torch.no_grad():
        close(compiled(x), net(x))
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    assert sum("lightning_rigl.linear" in str(node.target) for node in program.graph.nodes) == 3
    y = torch.randn(11, 32)
    close(program.module()(y), net(y))


def test_under_autocast_the_product_is_float32(backend):
    net = mlp().eval()
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse(net, backend, min_sparsity=0.0)(x.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(2, 12).double(), TypeError, "x is torch.float64; sparse products are float32"),
        (torch.randn(2, 13), ValueError, r"\(2, 13\), and the layer 12 inputs"),
        (torch.tensor(1.0), ValueError, r"shape \(\), and the layer 12 inputs"),
        (torch.randn(2, 12).to_sparse(), TypeError, r"x is torch.sparse_coo; .* give x.to_dense\(\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(backend, x, error, words):
    with pytest.raises(error, match=words):
        sparse(cut(nn.Linear(12, 20)), backend, min_sparsity=0.0)(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 20), lambda: nn.Conv1d(12, 20, 1)])
def test_a_layer_that_was_converted_is_refused_in_words(backend, make, dtype):
    layer = sparse(cut(make()), backend, min_sparsity=0.0)
    x = torch.randn(2, 12) if isinstance(layer, SparseLinear) else torch.randn(2, 12, 4)
    expected = layer(x)
    for each in (x, x.to(dtype)):
        with pytest.raises(TypeError, match=rf"the layer is {dtype}.*float32: .*\.float\(\).*dense model"):
            layer.to(dtype)(each)
    torch.testing.assert_close(layer.float()(x), expected, rtol=0.02, atol=0.02)


def test_an_image_of_the_wrong_shape_is_refused(backend):
    conv = sparse(cut(nn.Conv2d(12, 20, 1)), backend, min_sparsity=0.0)
    with pytest.raises(ValueError, match="must have 2 spatial dimensions"):
        conv(torch.randn(12, 3))
    with pytest.raises(ValueError, match="the layer 12 inputs at dimension 1"):
        conv(torch.randn(2, 11, 3, 3))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
        self.head.weight = self.words.weight


def hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched():
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OwnForward(6, 6), "a forward pass of its own"),
        (lambda: OwnConvolution(6, 6, 1), "a forward pass of its own"),
        (patched, "a forward pass of its own"),
        (hooked, "watched by hooks"),
        (Tied, "tied"),
        (
            lambda: nn.Linear(6, 6).double(),
            "torch.float64 on cpu, and sparse products are float32 on the CPU",
        ),
        (lambda: nn.Linear(6, 6, device="meta"), "torch.float32 on meta"),
        (lambda: nn.LazyLinear(6), "no plain weight"),
        (lambda: nn.Linear(6, 0), "empty"),
        (lambda: nn.MultiheadAttention(6, 1), "attention layer that does not call it"),
        (lambda: nn.Conv2d(6, 6, 3), "larger kernel"),
        (lambda: nn.Conv2d(6, 6, 1, stride=2), "strides"),
        (lambda: nn.Conv2d(6, 6, 1, groups=2), "groups"),
        (lambda: nn.Conv2d(6, 6, 1, padding=1), "padding"),
        (lambda: nn.Linear(60, 60), "less sparse than 0.5"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_stay_dense_and_why(make, words):
    layer = make()
    if words != "less sparse than 0.5":
        for p in layer.parameters():
            if not nn.parameter.is_lazy(p):
                p.data.zero_()
    report = sparse_report(sparse(layer, "torch", min_sparsity=0.5))
    assert report.sparse == ()
    assert words in "; ".join(report.reasons.values())
    assert words in str(report)


def test_what_pads_nothing_is_a_product():
    for padding in ("valid", "same", 0):
        conv = cut(nn.Conv2d(6, 6, 1, padding=padding, dilation=2))
        assert isinstance(sparse(conv, "torch", min_sparsity=0.0), SparseConv1x1)


def test_a_layer_at_two_places_is_replaced_at_both(backend):
    shared = cut(nn.Linear(8, 8))
    net = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"])
    fast = sparse(net, backend, min_sparsity=0.0)
    assert fast[0] is fast[2]
    assert isinstance(fast[0], SparseLinear)
    close(fast(torch.ones(1, 8)), net(torch.ones(1, 8)))


def test_the_layers_of_a_transformer_are_called(backend, monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = cut(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval().requires_grad_(False)
    fast, x = sparse(net, backend, min_sparsity=0.5), torch.randn(2, 5, 8)
    assert sparse_report(fast).backends == {
        f"layers.{i}.{name}": "dense" if "attn" in name else backend
        for i in range(2)
        for name in ("self_attn.out_proj", "linear1", "linear2")
    }
    called, forward = [], SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: called.append(self) or forward(self, x))
    close(fast(x), net(x))
    assert len(called) == 4  # torch's fused kernel would have read their weights
    nested = nn.TransformerEncoder(layer, 2).eval()
    assert nested.use_nested_tensor
    assert sparse_report(sparse(nested, backend, min_sparsity=0.0)).sparse == ()


def test_parametrizations_are_carried_out(backend):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(cut(nn.Linear(8, 6))))
    fast = sparse(net, backend, min_sparsity=0.5)
    assert isinstance(fast[0], SparseLinear)
    close(fast(torch.ones(2, 8)), net(torch.ones(2, 8)))
    assert nn.utils.parametrize.is_parametrized(net[0])


def test_by_default_the_crossover_chooses(backend):
    net = nn.Sequential(
        *(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 16)),
        *(nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, 16, 1)),
    )
    cut(net, 0.02)
    net[1].weight.data.fill_(1.0)
    report = sparse_report(sparse(net, backend))
    assert report.backends == {"0": backend, "1": "dense", "2": "dense", "4": "dense"}
    assert set(report.reasons.values()) == {"too dense or too small to gain"}
    assert report.counts["1"] == 512 * 512


def test_the_report_names_layers_shapes_densities_and_backends():
    net = mlp()
    net[3].weight.data.fill_(1.0)
    lines = str(sparse_report(sparse(net, "torch", min_sparsity=0.5))).splitlines()
    assert lines[1] == "dense: 3 (less sparse than 0.5)"
    row = next(line.split() for line in lines if line.startswith("0 "))
    count = int(net[0].weight.count_nonzero())
    assert row == ["0", "24", "x", "32", str(count), "of", "768", f"{count / 768:.4f}", "torch"]
    assert "no linear layer" in str(sparse_report(sparse(nn.ReLU(), "torch")))
    with pytest.raises(ValueError, match="does not come from lightning_rigl"):
        sparse_report(net)


def test_without_native_kernels_torch_is_taken_in_words(monkeypatch):
    monkeypatch.setattr(module, "native", lambda: None)
    with pytest.warns(UserWarning, match="native kernels are not at hand, torch's are taken: "):
        report = sparse_report(sparse(mlp(), min_sparsity=0.5))
    assert set(report.backends.values()) == {"torch"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(mlp(), "torch")  # asked for
    assert "native kernels are not at hand" in str(report)
    with pytest.raises(RuntimeError, match="native kernels cannot be had here"):
        sparse(mlp(), "native")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, TypeError, "torch.nn.Module, got int"),
        ({"backend": "cuda"}, ValueError, "one of auto, torch, native, got 'cuda'"),
        ({"min_sparsity": 1.5}, ValueError, "from 0 to 1, or None, got 1.5"),
        ({"min_sparsity": float("nan")}, ValueError, "got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        sparse(**{"model": mlp(), **arguments})


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    net = mlp()
    net.kept = net(torch.ones(1, 32))
    with pytest.raises(ValueError, match="cannot be copied"):
        sparse(net, "torch")


def test_a_compiled_or_wrapped_model_is_unwrapped():
    net = mlp()
    for wrapped in (torch.compile(net), nn.DataParallel(net)):
        assert type(sparse(wrapped, "torch", min_sparsity=0.0)) is nn.Sequential


def test_native_kernels_that_are_missing_later_are_said(monkeypatch):
    layer = SparseLinear(torch.eye(4), None, "torch")
    layer.backend = "native"
    from lightning_rigl.compute import operators

    operators.backend_of.cache_clear()
    monkeypatch.setattr(operators, "native", lambda: None)
    with pytest.raises(RuntimeError, match="native kernels were asked for, and cannot be had here"):
        layer(torch.ones(1, 4))
    operators.backend_of.cache_clear()
    assert backends.TorchBackend() == operators.backend_of("torch")
