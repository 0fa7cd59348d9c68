"""One forward pass -> which parameter costs what; torch's own counter is the second opinion."""

import gc
import json
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_rigl.flops.formulas import forward_cost
from lightning_rigl.flops.tracer import Tracer, meta_copy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())


def measure(net, *inputs, samples=None, call=None):
    with Tracer(dict(net.named_parameters())) as tracer:
        (call or net)(*inputs)
    return tracer.table(samples or inputs[0].shape[0])


def costs(table):
    return {layer.name: layer.forward for layer in table.layers}


def second_opinion(net, *inputs, call=None):
    """Forward FLOPs of the batch by torch's own counter, on meta, where nothing is fused."""
    with FlopCounterMode(display=False) as counter:
        (call or net)(*inputs)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------ whole networks


def lenet():
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


class WideBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.conv2(functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(x)))))) + self.skip(x)


class WideResNet22x2(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [16] + [32] * 3 + [64] * 3 + [128] * 3
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            *(WideBlock(a, b, 2 if i in (3, 6) else 1) for i, (a, b) in enumerate(pairwise(widths)))
        )
        self.bn, self.fc = nn.BatchNorm2d(128), nn.Linear(128, 10)

    def forward(self, x):
        return self.fc(functional.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


class MobileNetV1(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [32, 64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2
        self.conv1 = self.conv(3, 32, 3, stride=2)
        pairs = list(pairwise(widths))
        self.dw = nn.ModuleList(
            self.conv(a, a, 3, stride=2 if i in (1, 3, 5, 11) else 1, groups=a)
            for i, (a, _) in enumerate(pairs)
        )
        self.pw = nn.ModuleList(self.conv(a, b, 1) for a, b in pairs)
        self.fc = nn.Linear(1024, 1000)

    @staticmethod
    def conv(a, b, k, **kwargs):
        return nn.Sequential(
            nn.Conv2d(a, b, k, padding=k // 2, bias=False, **kwargs), nn.BatchNorm2d(b), nn.ReLU()
        )

    def forward(self, x):
        x = self.conv1(x)
        for dw, pw in zip(self.dw, self.pw, strict=True):
            x = pw(dw(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "build"),
    [("lenet_300_100", lenet), ("wrn22_2", WideResNet22x2), ("mobilenet_v1", MobileNetV1)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_network_costs_its_golden_numbers_layer_by_layer(name, build):
    golden = GOLDEN[name]
    with torch.device("meta"):
        net, x = build(), torch.empty(golden["input"])
    table = measure(net, x)
    assert costs(table) == {layer: row["fwd_flops"] for layer, row in golden["params"].items()}
    assert {layer.name: list(layer.shape) for layer in table.layers} == {
        layer: row["shape"] for layer, row in golden["params"].items()
    }
    assert (table.other, table.unknown) == (0, ())
    assert forward_cost(table) == golden["fwd_dense_macs2"]
    assert forward_cost(table, convention="official") == golden["fwd_dense_paper_rule"]
    for case in golden["cases"]:
        assert forward_cost(table, case["nnz"]) == case["fwd_sparse_macs2_from_nnz"]


# -------------------------------------------------------------------------------------- single layers

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear over time": (lambda: nn.Linear(6, 5), (4, 7, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (4, 6, 9)),
    "conv2d with stride": (lambda: nn.Conv2d(6, 4, (3, 5), stride=2, padding=1), (4, 6, 9, 11)),
    "conv2d dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=2), (4, 6, 9, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (4, 6, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (4, 6, 9, 9)),
    "conv2d reflecting": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (4, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3), (4, 6, 5, 5, 5)),
    "conv1d transposed": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2), (4, 6, 9)),
    "conv2d transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (4, 6, 9, 9)),
    "conv2d transposed grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 6, 9, 9)),
    "conv3d transposed dilated": (lambda: nn.ConvTranspose3d(6, 4, 2, dilation=2), (4, 6, 4, 4, 4)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_costs_what_torch_says_and_all_of_it_is_its_weights(layer, device):
    build, shape = LAYERS[layer]
    with torch.device(device):
        net, x = build(), torch.ones(shape)
    table = measure(net, x)
    assert costs(table) == {"weight": second_opinion(net, x) // 4}
    assert table.layers[0].outputs == net(x).numel() // 4
    assert (table.other, table.unknown) == (0, ())


def test_a_vector_parameter_counts_too():
    net = nn.ParameterDict({"score": nn.Parameter(torch.ones(6))})
    table = measure(net, torch.ones(4, 6), call=lambda x: x @ net["score"])
    assert costs(table) == {"score": 2 * 6}


def test_attention_is_products_of_four_weights_and_a_part_without_any():
    batch, time, width = 3, 5, 8
    for device in ("cpu", "meta"):  # fused on the CPU, separate products on meta
        with torch.device(device):
            net, x = nn.MultiheadAttention(width, 2, batch_first=True), torch.ones(batch, time, width)
        table = measure(net, x, x, x, call=lambda *qkv: net(*qkv, need_weights=False))  # noqa: B023
        assert costs(table) == {
            "in_proj_weight": 2 * time * width * 3 * width,
            "out_proj.weight": 2 * time * width * width,
        }
        assert table.other == 2 * 2 * time * time * width
        assert forward_cost(table, {"in_proj_weight": 0, "out_proj.weight": 0}) == table.other


FUSED = {
    "composed": functional.scaled_dot_product_attention,
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False),
    "flash": torch.ops.aten._scaled_dot_product_flash_attention,
}


@pytest.mark.parametrize("kernel", FUSED)
def test_attention_between_other_lengths_and_widths_costs_the_same_in_every_kernel(kernel):
    q, k, v = (torch.empty(2, 4, n, d, device="meta") for n, d in [(5, 8), (7, 8), (7, 6)])
    table = measure(nn.Module(), q, call=lambda q: FUSED[kernel](q, k, v))
    assert table.other == 2 * 4 * 5 * 7 * (8 + 6)
    assert 2 * table.other == second_opinion(None, q, k, v, call=functional.scaled_dot_product_attention)


def test_recurrent_layers_are_exact_on_meta_and_reported_where_they_are_fused():
    with torch.device("meta"):
        net, x = nn.LSTM(4, 8), torch.empty(5, 3, 4)
    table = measure(net, x, samples=3)
    assert costs(table) == {"weight_ih_l0": 2 * 5 * 32 * 4, "weight_hh_l0": 2 * 5 * 32 * 8}
    fused = measure(nn.LSTM(4, 8), torch.ones(5, 3, 4), samples=3)
    assert fused.layers or any("rnn" in name for name in fused.unknown)


# ------------------------------------------------------------------------------- whose product is it?


def test_a_shared_module_costs_each_of_its_uses():
    layer = nn.Linear(6, 6)
    assert costs(measure(layer, torch.ones(2, 6), call=lambda x: layer(layer(x)))) == {"weight": 2 * 72}


def test_tied_weights_are_one_row_and_a_lookup_is_free():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    table = measure(net, torch.zeros(2, 3, dtype=torch.long))
    assert costs(table) == {"0.weight": 2 * 3 * 40}
    assert table.unknown == ()


USES = {
    "functional": lambda w, x: functional.linear(x, w),
    "transposed": lambda w, x: x @ w.t(),
    "from the left": lambda w, x: w @ x.t(),
    "a slice of the columns": lambda w, x: (
        functional.linear(x[:, :3], w[:, :3]) + functional.linear(x[:, 3:], w[:, 3:])
    ),
    "in chunks": lambda w, x: torch.cat([functional.linear(x, part) for part in w.chunk(2)], 1),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "detached": lambda w, x: functional.linear(x, w.detach()),
    "a copy": lambda w, x: functional.linear(x, w.t().contiguous().t().clone()),
    "another type": lambda w, x: functional.linear(x.double(), w.double()),
    "expanded": lambda w, x: torch.bmm(w.expand(2, 4, 6), x[:, :, None]),
    "repeated": lambda w, x: torch.bmm(w.repeat(2, 1, 1), x[:, :, None]),
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_is_found_however_it_is_used(use):
    net = nn.Linear(6, 4, bias=False)
    table = measure(net, torch.ones(2, 6), call=lambda x: USES[use](net.weight, x))
    assert costs(table) == {"weight": 2 * 24}
    assert (table.other, table.unknown) == (0, ())


def test_autocast_casts_are_followed_also_from_its_cache():
    net = lenet()
    with torch.autocast("cpu", torch.bfloat16):
        table = measure(net, torch.ones(2, 784), call=lambda x: net(x) + net(x))
    assert costs(table) == {"0.weight": 2 * 470400, "2.weight": 2 * 60000, "4.weight": 2 * 2000}
    assert (table.other, table.unknown) == (0, ())


def test_memory_that_a_copy_gave_back_is_not_taken_for_the_weight():
    net = nn.Linear(64, 64, bias=False)

    def call(x):
        for _ in range(50):
            net.weight.detach().clone()  # freed at once
            gc.collect(0)
            torch.ones(64, 64) @ torch.ones(64, 64)  # may get the same memory

    table = measure(net, torch.ones(1, 64), call=call)
    assert table.layers == ()
    assert table.other == 50 * 2 * 64**3


def test_a_learned_query_times_a_weight_counts_for_the_weight():
    net = nn.ParameterDict(
        {"query": nn.Parameter(torch.ones(3, 6)), "weight": nn.Parameter(torch.ones(4, 6))}
    )
    table = measure(
        net, torch.ones(2), call=lambda x: functional.linear(net["query"].expand(2, 3, 6), net["weight"])
    )
    assert costs(table) == {"weight": 2 * 3 * 24}


# -------------------------------------------------------------------------- nothing passes unreported


REPORTED = {
    "aten._trilinear (weight)": lambda w, x: functional.bilinear(x, x, w[:, None].expand(4, 6, 6)),
    "aten.mul (weight)": lambda w, x: functional.linear(x, w * (w > 0)),
    "aten.cat (weight)": lambda w, x: functional.linear(x, torch.cat([w, w])),
    "aten.div (weight)": lambda w, x: functional.linear(x, w / 2),
    "aten.add (weight)": lambda w, x: functional.linear(x, w + torch.ones(4, 1) @ torch.ones(1, 6)),
    "aten.linalg_vector_norm (weight)": lambda w, x: x * w.norm(),
    "aten._foreach_mul (weight)": lambda w, x: functional.linear(x, torch._foreach_mul([w], 2.0)[0]),
}


@pytest.mark.parametrize("operator", REPORTED)
def test_an_operator_that_computes_with_a_weight_is_reported_by_name(operator):
    net = nn.Linear(6, 4, bias=False)
    table = measure(net, torch.ones(2, 6), call=lambda x: REPORTED[operator](net.weight, x))
    assert operator in table.unknown


QUIET = {
    "a position embedding": lambda w, x: x.expand(3, 4, 6) + w,
    "a class token": lambda w, x: torch.cat([w.expand(3, 4, 6), x.expand(3, 4, 6)], 1),
    "a scale per channel": lambda w, x: x.expand(3, 4, 6) * w,
    "a mask token": lambda w, x: torch.where(torch.ones(3, 4, 6) > 0, x.expand(3, 4, 6), w),
    "a norm over two dimensions": lambda w, x: functional.layer_norm(x.expand(3, 4, 6), (4, 6), w),
    "a lookup": lambda w, x: w[torch.tensor([1, 2])] + functional.embedding(torch.tensor([1, 2]), w),
    "the shape of a weight": lambda w, x: (
        torch.zeros_like(w) + torch.empty_like(w).fill_(0) + w.new_zeros(4, 6)
    ),
    "a running average": lambda w, x: w.data.mul_(0.9).add_(x.detach().mean()),
    "a question": lambda w, x: torch.equal(w, w) and w.shape == w.t().shape,
}


@pytest.mark.parametrize("use", QUIET)
def test_what_flop_counts_leave_out_is_not_reported(use):
    net = nn.ParameterDict({"weight": nn.Parameter(torch.ones(4, 6))})
    table = measure(net, torch.ones(1, 6), call=lambda x: QUIET[use](net["weight"], x))
    assert (table.layers, table.other, table.unknown) == ((), 0, ())


def test_biases_and_norms_are_not_reported():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Flatten())
    table = measure(net, torch.ones(2, 3, 5, 5))
    assert (list(costs(table)), table.unknown) == (["0.weight"], ())


def test_a_control_flow_operator_that_hides_its_products_is_reported():
    net = nn.Linear(6, 4)
    branch = torch.tensor(True)
    call = lambda x: torch.cond(branch, lambda x: net(x), lambda x: net(-x), (x,))  # noqa: E731
    assert "cond" in measure(net, torch.ones(2, 6), call=call).unknown


def test_a_tensor_of_an_exotic_kind_is_reported_and_does_not_break_the_step():
    net = nn.Linear(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        ragged = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=torch.strided)
    with Tracer(dict(net.named_parameters())) as tracer:
        sparse = torch.sparse.mm(torch.eye(6).to_sparse(), net.weight.t())
        net(ragged)
    assert sparse.shape == (6, 4)
    assert "aten._sparse_addmm (weight)" in tracer.table(1).unknown
    assert "aten.linear (RuntimeError)" in tracer.table(1).unknown


# ------------------------------------------------------------------------------- what counts as forward


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        h = self.proj(x)
        return h @ (h.transpose(1, 2) @ h).softmax(-1)


def test_the_backward_pass_is_not_counted():
    net, x = lenet(), torch.ones(2, 784)
    table = measure(net, x, call=lambda x: net(x).sum().backward())
    assert forward_cost(table) == 532400


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_costs_what_it_costs_without(reentrant):
    net, x = Attention(), torch.ones(2, 3, 6, requires_grad=True)
    plain = measure(net, x)

    def call(x):
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()

    assert measure(net, x, call=call) == plain
    assert plain.other == 2 * 2 * 3 * 6 * 6


def test_a_custom_autograd_function_counts():
    net = nn.ParameterDict({"w": nn.Parameter(torch.ones(6, 4))})
    table = measure(net, torch.ones(2, 6), call=lambda x: Times.apply(x, net["w"]).sum().backward())
    assert costs(table) == {"w": 2 * 24}


def test_a_frozen_backbone_counts_and_a_frozen_teacher_without_gradients_does_not():
    net, x = nn.Linear(6, 4).requires_grad_(False), torch.ones(2, 6)
    assert costs(measure(net, x)) == {"weight": 48}
    assert costs(measure(net, x, call=torch.no_grad()(net))) == {}
    assert costs(measure(net, x, call=torch.inference_mode()(net))) == {}


def test_an_optimizer_step_inside_is_not_counted():
    net, x = nn.Linear(6, 4), torch.ones(2, 6)
    optimizers = [
        torch.optim.AdamW(net.parameters(), weight_decay=0.1),
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1, foreach=False),
        torch.optim.Muon([net.weight]),
    ]

    def call(x):
        net(x).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    table = measure(net, x, call=call)
    assert (costs(table), table.other, table.unknown) == ({"weight": 48}, 0, ())


def test_a_compiled_module_is_measured_as_written_also_where_breaks_are_errors():
    net = lenet()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert forward_cost(measure(net, torch.ones(2, 784), call=compiled)) == 532400


def test_a_frozen_encoder_in_evaluation_mode_is_not_fused():
    with torch.device("cpu"):
        net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.ones(2, 5, 8)
    table = measure(net, x)
    assert forward_cost(table) == second_opinion(net.to("meta"), x.to("meta")) // 2
    assert table.unknown == ()


# ----------------------------------------------------------------------------------------- per sample


def test_costs_are_per_sample_and_rounded_to_the_nearest():
    net = nn.Linear(1, 1, bias=False)
    assert [costs(measure(net, torch.ones(n, 1), samples=4))["weight"] for n in (4, 5, 6, 7)] == [2, 3, 3, 4]


@pytest.mark.parametrize("samples", [0, -1])
def test_an_empty_batch_cannot_be_divided_by(samples):
    with pytest.raises(ValueError, match="at least 1"):
        Tracer({}).table(samples)


def test_a_parameter_without_a_product_has_no_row():
    net = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    assert list(costs(measure(net, torch.ones(2, 6), call=net["used"]))) == ["used.weight"]


# ------------------------------------------------------------------------------------------ no traces


def test_everything_is_put_back_also_after_an_error():
    fused = torch.backends.mha.get_fastpath_enabled()

    def call(x):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError

    with pytest.raises(KeyError):
        measure(nn.Linear(6, 4), torch.ones(2, 6), call=call)
    assert torch.backends.mha.get_fastpath_enabled() is fused is True
    assert _len_torch_dispatch_stack() == 0
    frames = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: frames.append(graph) or graph.forward)
    compiled(torch.ones(2))
    assert frames  # compilation is on again


def test_a_meta_copy_has_the_shapes_and_ties_and_none_of_the_values():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    net.scale = torch.ones(3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    twin = meta_copy(net)
    assert twin[1].weight is twin[0].weight
    assert [(p.shape, p.dtype, p.requires_grad) for p in twin.parameters()] == [
        (p.shape, p.dtype, p.requires_grad) for p in net.parameters()
    ]
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers(), twin.scale))
    assert all(isinstance(p, nn.Parameter) for p in twin.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_meta_copy_puts_other_objects_where_the_memo_says():
    net = nn.Linear(2, 2)
    net.boss, net.data = object(), [1]
    twin = meta_copy(net, {id(net.boss): None, id(net.data): net.data})
    assert twin.boss is None
    assert twin.data is net.data


def test_recurrent_weights_stay_tied_to_their_flat_list_in_a_meta_copy():
    twin = meta_copy(nn.GRU(4, 8))
    table = measure(twin, torch.empty(5, 3, 4, device="meta"), samples=3)
    assert costs(table) == {"weight_ih_l0": 2 * 5 * 24 * 4, "weight_hh_l0": 2 * 5 * 24 * 8}
