"""Each kind of layer against a formula by hand: forward pass, gradients that autograd computes, repeats."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

from lightning_rigl import Sparsifier
from lightning_rigl.flops.formulas import actual_step_cost, forward_cost
from tests.flops.measuring import measure, rows, second_opinion

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the networks are

from paper_networks import CharLM, ResNet50, WideResNet22x2, lenet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())

on_both_devices = pytest.mark.parametrize("device", ["cpu", "meta"])
first_or_later = pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])


# ------------------------------------------------------------------------ linear layers and convolutions

# layer, shape of its input, positions: those of the output, of a transposed convolution those of the input
ALONE = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6), 1),
    "linear over time": (lambda: nn.Linear(6, 5), (4, 7, 6), 7),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 7, 6), 7),
    "conv1d padded": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (4, 6, 9), 9),
    "conv2d padded, with stride": (lambda: nn.Conv2d(6, 4, (3, 5), 2, padding=1), (4, 6, 9, 11), 5 * 5),
    "conv2d dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=2), (4, 6, 9, 9), 5 * 5),
    "conv2d reflecting": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (4, 6, 9, 9), 81),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3), (4, 6, 5, 5, 5), 27),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2), (4, 6, 9), 9),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, output_padding=1), (4, 6, 9, 9), 81),
    "transposed conv3d dilated": (lambda: nn.ConvTranspose3d(6, 4, 2, dilation=2), (4, 6, 4, 4, 4), 64),
}
GROUPED = {
    "conv1d in groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), (4, 6, 9), 7),
    "conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (4, 6, 9, 9), 49),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (4, 6, 9, 9), 49),
    "transposed conv2d in groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 6, 9, 9), 81),
}
LAYERS = ALONE | GROUPED


@on_both_devices
@first_or_later
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_costs_its_size_times_its_positions(layer, trained, first, device):
    build, shape, positions = LAYERS[layer]
    with torch.device(device):
        net, x = build().requires_grad_(trained), torch.ones(shape, requires_grad=not first)
    products = net.weight.numel() * positions
    table = measure(net, x)
    assert rows(table) == {"weight": (products, products * (not first), products * trained)}
    assert table.layers[0].outputs == net(x).numel() // 4
    assert (table.other, table.other_gradient, table.unknown) == (0, 0, ())
    assert second_opinion(net, x) == 4 * 2 * products
    if layer in ALONE and (trained or not first):
        assert second_opinion(net, x, backward=True) == 4 * actual_step_cost(table)


@pytest.mark.parametrize("layer", GROUPED)
def test_torch_counts_the_weight_gradient_of_groups_once_per_group(layer):
    build, shape, positions = GROUPED[layer]
    with torch.device("meta"):
        net, x = build(), torch.ones(shape)
    excess = second_opinion(net, x, backward=True) - 4 * actual_step_cost(measure(net, x))
    assert excess == 4 * 2 * (net.groups - 1) * net.weight.numel() * positions


# -------------------------------------------------------------------------------------- recurrent layers


def by_hand(net, steps, starts=(1, 1), first=True):
    """Multiply-adds of ``steps`` steps; ``starts`` of them (forwards, backwards) have no state to train."""
    gates, out = {"LSTM": 4, "GRU": 3}.get(net.mode, 1), net.proj_size or net.hidden_size
    expected = {}
    for layer in range(net.num_layers):
        for suffix, start in list(zip(("", "_reverse"), starts, strict=True))[: 1 + net.bidirectional]:
            width = out * (1 + net.bidirectional) if layer else net.input_size
            ih, hh = (gates * net.hidden_size * n for n in (width, out))
            back = steps * (bool(layer) or not first), steps - start
            expected[f"weight_ih_l{layer}{suffix}"] = steps * ih, back[0] * ih, steps * ih
            expected[f"weight_hh_l{layer}{suffix}"] = steps * hh, back[1] * hh, steps * hh
            if net.proj_size:
                hr = steps * net.hidden_size * out
                expected[f"weight_hr_l{layer}{suffix}"] = hr, hr, hr
    return expected


RECURRENT = {
    "RNN": lambda: nn.RNN(6, 8),
    "RNN of relu, two layers": lambda: nn.RNN(6, 8, 2, nonlinearity="relu", bias=False),
    "GRU": lambda: nn.GRU(6, 8),
    "GRU in both directions": lambda: nn.GRU(6, 8, 2, bidirectional=True),
    "LSTM": lambda: nn.LSTM(6, 8),
    "LSTM in both directions": lambda: nn.LSTM(6, 8, 2, bidirectional=True, dropout=0.5),
    "LSTM projected": lambda: nn.LSTM(6, 8, proj_size=3),
    "LSTM projected, in both directions": lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3),
}


@on_both_devices
@first_or_later
@pytest.mark.parametrize("layer", RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_recurrent_layer(layer, first, device):
    with torch.device(device):
        net, x = RECURRENT[layer](), torch.ones(5, 3, 6, requires_grad=not first)
    table = measure(net, x, samples=3)
    fused = (
        device == "cpu" and net.mode == "LSTM" and not net.proj_size and torch.backends.mkldnn.is_available()
    )
    assert rows(table) == by_hand(net, 5, first=first)
    assert (table.other, table.unknown) == (0, ())
    if fused:
        assert second_opinion(net, x) == 0  # torch has no rule for it
    else:
        assert second_opinion(net, x, backward=True) == 3 * actual_step_cost(table)


@pytest.mark.parametrize("given", [(), ("x",), ("state",), ("x", "state")])
def test_a_fused_lstm_costs_the_same_as_its_steps_on_meta(given):
    tables = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net, x = nn.LSTM(6, 8, 2, bidirectional=True), torch.ones(5, 3, 6, requires_grad="x" in given)
            state = torch.ones(4, 3, 8, requires_grad="state" in given), torch.ones(4, 3, 8)
        tables.append(measure(net, x, samples=3, call=lambda x: net(x, state)))  # noqa: B023
    assert tables[0] == tables[1]


def test_a_frozen_fused_lstm_has_no_gradients():
    net = nn.LSTM(6, 8).requires_grad_(False)
    table = measure(net, torch.ones(5, 3, 6), samples=3)
    assert {row[1:] for row in rows(table).values()} == {(0, 0)}


def test_the_fused_layer_of_cudnn_by_its_shapes():
    with torch.device("meta"):
        net, x, state = nn.LSTM(6, 8, 2, bidirectional=True), torch.empty(5, 3, 6), torch.empty(4, 3, 8)
    sizes = 2, 8, 0, 2, False, 0.0, True, True, [], None
    call = lambda x: torch.ops.aten._cudnn_rnn(x, net._flat_weights, 4, None, state, state, *sizes)  # noqa: E731
    assert rows(measure(net, x, samples=3, call=call)) == by_hand(net, 5)


@pytest.mark.parametrize("layer", RECURRENT)
def test_a_packed_sequence_costs_its_real_steps(layer):
    net = RECURRENT[layer]()
    packed = rnn.pack_padded_sequence(torch.ones(5, 3, 6), [5, 3, 1])
    table = measure(net, packed, samples=1)
    # forwards all three start at once; backwards the longest alone, and the others join its states
    assert rows(table) == by_hand(net, 5 + 3 + 1, starts=(3, 1))


@on_both_devices
@pytest.mark.parametrize(("cell", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_a_cell_by_itself(cell, gates, device):
    def unroll(x):
        state = None
        for step in x:
            state = net(step, state)
        return state

    with torch.device(device):
        net, x = cell(6, 8), torch.ones(5, 3, 6)
    ih, hh = gates * 8 * 6, gates * 8 * 8
    table = measure(net, x, samples=3, call=unroll)
    assert rows(table) == {"weight_ih": (5 * ih, 0, 5 * ih), "weight_hh": (5 * hh, 4 * hh, 5 * hh)}


# --------------------------------------------------------------------------------------------- attention


def attention(queries, keys, width, gradient=True):
    """Two products of the square, whatever a causal mask leaves out; each has two gradients."""
    products = 2 * queries * keys * width
    return 2 * products, 4 * products * gradient


@on_both_devices
@first_or_later
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(need_weights, first, device):
    with torch.device(device):
        net, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(3, 5, 8, requires_grad=not first)
    call = lambda x: net(x, x, x, need_weights=need_weights)[0]  # noqa: E731
    table = measure(net, x, call=call)
    inside, outside = 5 * 24 * 8, 5 * 8 * 8
    assert rows(table) == {
        "in_proj_weight": (inside, inside * (not first), inside),
        "out_proj.weight": (outside, outside, outside),
    }
    assert (table.other, table.other_gradient) == attention(5, 5, 8)
    assert forward_cost(table, {"in_proj_weight": 0, "out_proj.weight": 0}) == table.other
    if device == "meta":
        assert second_opinion(net, x, call=call, backward=True) == 3 * actual_step_cost(table)


CROSS = {
    "one memory": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda q, k: (q, k, k)),
    "three inputs": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda q, k: (q, k, k + 1)),
    "other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
        lambda q, k: (q, k[..., :6], k[..., :5]),
    ),
}


@on_both_devices
@pytest.mark.parametrize("kind", CROSS)
def test_cross_attention_has_a_row_for_each_slice_of_its_weight(kind, device):
    build, inputs = CROSS[kind]
    with torch.device(device):
        net, (q, k) = build(), (torch.ones(2, 3, 8), torch.ones(2, 4, 8))
    call = lambda q: net(*inputs(q, k), need_weights=False)[0]  # noqa: E731
    table = measure(net, q, call=call)
    names = {
        "one memory": {"in_proj_weight[0:64]": 3 * 64, "in_proj_weight[64:192]": 4 * 128},
        "three inputs": {
            "in_proj_weight[0:64]": 3 * 64,
            "in_proj_weight[64:128]": 4 * 64,
            "in_proj_weight[128:192]": 4 * 64,
        },
        "other widths": {
            "q_proj_weight": 3 * 8 * 8,
            "k_proj_weight": 4 * 8 * 6,
            "v_proj_weight": 4 * 8 * 5,
        },
    }[kind]
    outside = 3 * 8 * 8
    assert rows(table) == {
        **{name: (products, 0, products) for name, products in names.items()},
        "out_proj.weight": (outside, outside, outside),
    }
    assert (table.other, table.other_gradient) == attention(3, 4, 8)
    if device == "meta":
        assert second_opinion(net, q, call=call, backward=True) == 2 * actual_step_cost(table)


SDPA = {
    "full": {},
    "causal": {"is_causal": True},
    "with a mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "with dropout": {"dropout_p": 0.1},
}


@on_both_devices
@pytest.mark.parametrize("kind", SDPA)
def test_fused_attention_counts_the_full_square(kind, device):
    with torch.device(device):
        q, k, v = (torch.ones(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    options = {key: value.to(device) if key == "attn_mask" else value for key, value in SDPA[kind].items()}
    call = lambda q: functional.scaled_dot_product_attention(q, k, v, **options)  # noqa: E731
    table = measure(nn.Module(), q, call=call)
    assert (table.other, table.other_gradient) == attention(5, 5, 4 * 8)
    assert table.layers == ()
    seen = second_opinion(None, q, call=call, backward=True)
    if device == "meta":
        assert seen == 2 * actual_step_cost(table)
    elif kind != "with dropout":  # that is not fused
        assert seen == 0  # torch has no rule for the kernel of the CPU


KERNELS = {
    "composed": functional.scaled_dot_product_attention,
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False),
    "flash": torch.ops.aten._scaled_dot_product_flash_attention,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_between_other_lengths_and_widths_costs_the_same_in_every_kernel(kernel):
    q, k, v = (torch.empty(2, 4, n, d, device="meta") for n, d in [(5, 8), (7, 8), (7, 6)])
    table = measure(nn.Module(), q, call=lambda q: KERNELS[kernel](q, k, v))
    assert (table.other, table.other_gradient) == (2 * 4 * 5 * 7 * (8 + 6), 0)
    assert 2 * table.other == second_opinion(None, q, k, v, call=functional.scaled_dot_product_attention)


@on_both_devices
def test_queries_that_share_keys_cost_as_if_they_did_not(device):
    with torch.device(device):
        q, k = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 5, 8)
    call = lambda q: functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)  # noqa: E731
    assert measure(nn.Module(), q, call=call).other == attention(5, 5, 4 * 8)[0]


@on_both_devices
@pytest.mark.parametrize(("trained", "gradients"), [("q", 2), ("k", 2), ("v", 1), ("qk", 3), ("kv", 3)])
def test_the_gradient_of_attention_is_that_of_the_inputs_that_are_trained(trained, gradients, device):
    """Of the scores' two operands, and of the second product's two: the scores and the values."""
    with torch.device(device):
        q, k, v = (torch.ones(2, 4, 5, 8, requires_grad=name in trained) for name in "qkv")
    call = lambda q: functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
    table = measure(nn.Module(), q, call=call)
    assert table.other_gradient == 2 * 4 * 5 * 5 * 8 * gradients
    if device == "meta":
        assert second_opinion(None, q, call=call, backward=True) == 2 * actual_step_cost(table)


EVALUATED = {
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda net, x: net(x, x, x, need_weights=False)[0],
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda net, x: net(x)),
}


@pytest.mark.parametrize("kind", EVALUATED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fast_path_of_evaluation_is_counted_as_written(kind, mode):
    build, run = EVALUATED[kind]
    net, x = build().eval(), torch.ones(3, 5, 8)
    call = lambda x: run(net, x)  # noqa: E731
    with mode():
        table = measure(net, x, call=call, inference=True)
        assert second_opinion(net, x, call=call) == 0  # torch has no rule for it
    twin = build().eval().to("meta")
    expected = second_opinion(twin, x.to("meta"), call=lambda x: run(twin, x))
    assert 3 * forward_cost(table) == expected
    assert table.unknown == ()


# ----------------------------------------------------------------------------- lookups, bilinear, vectors


@on_both_devices
def test_a_lookup_is_free_and_its_tied_head_is_not(device):
    with torch.device(device):
        net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        words = torch.zeros(2, 3, dtype=torch.long)
    net[1].weight = net[0].weight
    table = measure(net, words)
    assert rows(table) == {"0.weight": (3 * 40, 3 * 40, 3 * 40)}
    assert table.unknown == ()
    assert second_opinion(net, words, backward=True) == 2 * actual_step_cost(table)


@on_both_devices
@first_or_later
def test_a_bilinear_layer_is_the_first_input_times_the_weight_then_times_the_second(first, device):
    with torch.device(device):
        net = nn.Bilinear(6, 5, 4)
        inputs = [torch.ones(2, n, requires_grad=not first) for n in (6, 5)]
    table = measure(net, *inputs)
    weight, rest = 4 * 6 * 5, 4 * 5
    assert rows(table) == {"weight": (weight, weight * (not first), weight)}
    assert (table.other, table.other_gradient) == (2 * rest, 2 * rest * (1 + (not first)))
    assert second_opinion(net, *inputs) == 0  # torch has no rule for it


@on_both_devices
def test_a_vector_parameter_counts_too(device):
    with torch.device(device):
        net, x = nn.ParameterDict({"score": nn.Parameter(torch.ones(6))}), torch.ones(4, 6)
    call = lambda x: x @ net["score"]  # noqa: E731
    assert rows(measure(net, x, call=call)) == {"score": (6, 0, 6)}
    assert second_opinion(net, x, call=call) == 0  # torch has no rule for it


@on_both_devices
def test_products_in_batches_added_up_or_to_something(device):
    with torch.device(device):
        net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 5, 6)
        one, each = torch.zeros(5, 4), torch.zeros(2, 5, 4)
    weights = lambda: net.weight.t().expand(2, 6, 4)  # noqa: E731
    for call in (lambda x: torch.addbmm(one, x, weights()), lambda x: torch.baddbmm(each, x, weights())):
        assert rows(measure(net, x, call=call)) == {"weight": (5 * 24, 0, 5 * 24)}


def test_a_grouped_product_of_experts():
    net = nn.ParameterDict({"experts": nn.Parameter(torch.ones(3, 8, 16))})
    ends = torch.tensor([2, 4, 7], dtype=torch.int32)
    call = lambda x: torch._grouped_mm(x, net["experts"].bfloat16(), offs=ends)  # noqa: E731
    table = measure(net, torch.ones(7, 8, dtype=torch.bfloat16), call=call)
    assert rows(table) == {"experts": (8 * 16, 0, 8 * 16)}


# ------------------------------------------------------------------ what is trained, and what is repeated


@on_both_devices
def test_a_frozen_layer_has_no_weight_gradient_and_hands_gradients_to_those_before_it(device):
    with torch.device(device):
        net, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), torch.ones(2, 6)
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    table = measure(net, x)
    assert list(rows(table).values()) == [(36, 0, 0), (36, 0, 36), (36, 36, 0), (36, 36, 36)]
    assert second_opinion(net, x, backward=True) == 2 * actual_step_cost(table)


def test_a_detached_activation_takes_no_gradient_also_after_a_checkpoint():
    net, x = nn.Linear(6, 6), torch.ones(2, 6, requires_grad=True)
    for call in (
        lambda x: net(net(x).detach()),
        lambda x: net(checkpoint(net, x, use_reentrant=True).detach()),
    ):
        assert rows(measure(net, x, call=call)) == {"weight": (72, 36, 72)}


class Block(nn.Module):
    """A stem, two layers and attention without weights that are computed again, and a head."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.first, self.last, self.head = (nn.Linear(6, 6) for _ in range(4))

    def inner(self, x):
        x = self.first(x).relu()
        return self.last(x @ (x.transpose(1, 2) @ x).softmax(-1))

    def forward(self, x):
        x = self.stem(x)
        if self.reentrant is None:
            return self.head(self.inner(x))
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@on_both_devices
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_what_a_checkpoint_computes_again_is_booked_apart(reentrant, device):
    with torch.device(device):
        net, x = Block(reentrant), torch.ones(2, 3, 6)
    table = measure(net, x, backward=True)
    layer, scores = 3 * 36, 2 * 3 * 6 * 6
    assert rows(table) == {
        "stem.weight": (layer, 0, layer),
        **{f"{name}.weight": (layer, layer, layer) for name in ("first", "last", "head")},
    }
    assert (table.other, table.other_gradient) == (2 * scores, 4 * scores)
    again = {layer.name: layer.recompute // 2 for layer in table.layers if layer.recompute}
    # the last product of the block is not needed for a gradient: the newer kind stops before it
    expected = {None: {}, True: {"first.weight": layer, "last.weight": layer}, False: {"first.weight": layer}}
    assert again == expected[reentrant]
    assert table.other_recompute == (2 * scores if reentrant is not None else 0)
    assert second_opinion(net, x, backward=True) == 2 * actual_step_cost(table)


class Times(torch.autograd.Function):
    """x w', with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        none = (None,) * (len(ctx.needs_input_grad) - 2)
        return grad @ w if ctx.needs_input_grad[0] else None, grad.t() @ x, *none


class TimesMasked(Times):
    """The same with a mask on the weight, of which the gradient knows nothing."""

    @staticmethod
    def forward(ctx, x, w, mask):
        return Times.forward(ctx, x, w * mask)


@on_both_devices
@first_or_later
@pytest.mark.parametrize("masked", [True, False])
def test_a_custom_autograd_function(masked, first, device):
    with torch.device(device):
        net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 6, requires_grad=not first)
        net.register_buffer("mask", torch.ones(4, 6))
    function, more = (TimesMasked, (net.mask,)) if masked else (Times, ())
    call = lambda x: function.apply(x, net.weight, *more)  # noqa: E731
    table = measure(net, x, call=call, backward=True)
    assert rows(table) == {"weight": (24, 24 * (not first), 24)}
    assert second_opinion(net, x, call=call, backward=True) == 2 * actual_step_cost(table)


@on_both_devices
def test_a_compiled_module_is_measured_as_written_also_where_breaks_are_errors(device):
    with torch.device(device):
        net, x = lenet(), torch.ones(2, 784)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert measure(net, x, call=compiled, backward=True) == measure(net, x)


# ---------------------------------------------------------------------------------------- whole networks


class Translator(nn.Module):
    """An encoder and a decoder, causal, with a head tied to the lookup."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, words):
        x = self.words(words)
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.net(x, x, tgt_mask=mask, tgt_is_causal=True))


NETS = {
    "lenet": (lenet, (4, 784)),
    "resnet50": (ResNet50, (4, 3, 224, 224)),
    "wide resnet": (WideResNet22x2, (4, 3, 32, 32)),
    "char GRU": (CharLM, (4, 16)),
    "transformer": (Translator, (4, 7)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_training_step_of_the_dense_model_is_what_torch_counts(name):
    build, shape = NETS[name]
    with torch.device("meta"):
        net, x = build(), torch.zeros(shape, dtype=torch.long if len(shape) == 2 and shape[1] < 99 else None)
        table = measure(net, x)
        assert second_opinion(net, x, backward=True) == 4 * actual_step_cost(table)
    assert table.unknown == ()


# -------------------------------------------------------------------------------------------- real masks


@pytest.mark.parametrize("layer", [name for name in LAYERS if "padded" not in name])
def test_a_mask_costs_the_products_that_its_ones_take_part_in(layer):
    """Ones through a layer whose weights are its mask count them."""
    build, shape, _ = LAYERS[layer]
    net, x = build(), torch.ones(shape)
    mask = torch.rand_like(net.weight) < 0.3
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.weight.copy_(mask)
    products = int(net(x).sum()) // 4
    assert 0 < forward_cost(measure(net, x), {"weight": int(mask.sum())}) == 2 * products


def test_masks_of_slices_cost_the_products_of_each_slice():
    net, q, k = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    table = measure(net, q, call=lambda q: net(q, k, k + 1, need_weights=False))
    sparsifier = Sparsifier(net, 0.7, seed=0)
    masks = sparsifier.masks
    counts = sparsifier.counts | {
        part.key: int(masks[part.name].flatten()[part.start : part.stop].sum())
        for part in table.layers
        if part.stop is not None
    }
    parts = zip(masks["in_proj_weight"].float().chunk(3), (q, k, k), strict=True)
    products = sum(int(functional.linear(x[0], mask).sum()) for mask, x in parts)
    products += int(functional.linear(q[0], masks["out_proj.weight"].float()).sum())
    assert forward_cost(table, counts) == table.other + 2 * products
    assert len({counts[part.key] for part in table.layers}) == 4  # the slices differ


@pytest.mark.parametrize(("name", "build"), [("lenet_300_100", lenet), ("wrn22_2", WideResNet22x2)])
def test_drawn_masks_of_a_network_cost_its_golden_integers(name, build):
    net = build()
    with torch.device("meta"):
        table = measure(build(), torch.zeros(GOLDEN[name]["input"]))
    (case,) = (c for c in GOLDEN[name]["cases"] if (c["distribution"], c["sparsity"]) == ("erk", 0.9))
    sparsifier = Sparsifier(net, 0.9, seed=0)
    active = {key: int((net.get_parameter(key) != 0).sum()) for key in sparsifier.masks}
    assert active == case["nnz"]
    assert forward_cost(table, active) == case["fwd_sparse_macs2_from_nnz"]
    assert actual_step_cost(table, active) == case["train_actual_from_nnz"]
