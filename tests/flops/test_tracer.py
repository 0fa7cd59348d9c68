"""Which parameter a product belongs to, what is reported, what is part of training; and no trace stays."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

from lightning_rigl.flops.formulas import actual_step_cost, forward_cost
from lightning_rigl.flops.meta import meta_copy
from lightning_rigl.flops.tracer import Tracer
from tests.flops.measuring import costs, measure, rows, second_opinion, without_gradient

on_both_devices = pytest.mark.parametrize("device", ["cpu", "meta"])
linear = functional.linear


def bare(**shapes):
    """A module of bare parameters."""
    return nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})


# ---------------------------------------------------------------------- whose product is it? one weight


def standardized(w):
    return (w - w.mean(1, keepdim=True)) / torch.sqrt(w.var(1, keepdim=True) + 1e-5)


def normalized_as_a_batch(w):
    return functional.batch_norm(w.reshape(1, 4, 6), None, None, training=True).reshape(4, 6)


USES = {
    "functional": lambda w, x: linear(x, w),
    "transposed": lambda w, x: x @ w.t(),
    "from the left": lambda w, x: w @ x.t(),
    "columns": lambda w, x: linear(x[:, :3], w[:, :3]) + linear(x[:, 3:], w[:, 3:]),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "a copy": lambda w, x: linear(x, w.t().contiguous().t().clone()),
    "another type": lambda w, x: linear(x.double(), w.double()),
    "expanded": lambda w, x: torch.bmm(w.expand(2, 4, 6), x[:, :, None]),
    "expanded and copied": lambda w, x: torch.bmm(w.expand(2, 4, 6).contiguous(), x[:, :, None]),
    "repeated": lambda w, x: torch.bmm(w.repeat(2, 1, 1), x[:, :, None]),
    "with dropped connections": lambda w, x: linear(x, functional.dropout(w)),
    "with dropped connections by one kernel": lambda w, x: linear(x, torch.native_dropout(w, 0.5, True)[0]),
    "standardized": lambda w, x: linear(x, standardized(w)),
    "standardized by a batch norm": lambda w, x: linear(x, normalized_as_a_batch(w)),
    "scaled by a number of the batch": lambda w, x: linear(x, w * x.detach().mean()),
    "rounded, straight through": lambda w, x: linear(x, w + (w.round() - w).detach()),
    "above a threshold": lambda w, x: linear(x, w * (w.abs() > 0.5)),
    "a triangle": lambda w, x: linear(x, w.tril()),
    "a triangle by a mask made on the spot": lambda w, x: linear(x, w * torch.ones(4, 6).tril()),
    "turned round": lambda w, x: linear(x, w.flip(0).roll(1, 1)),
    "padded": lambda w, x: linear(x, functional.pad(w[:, 1:], (1, 0))),
}


@on_both_devices
@pytest.mark.parametrize("use", USES)
def test_a_weight_is_found_however_it_is_used(use, device):
    with torch.device(device):
        net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 6)
        call = lambda x: USES[use](net.weight, x)  # noqa: E731
        table = measure(net, x, call=call)
        assert second_opinion(net, x, call=call, backward=True) == 2 * actual_step_cost(table)
    assert rows(table) == {"weight": (24, 0, 24)}
    assert (table.other, table.other_gradient, table.unknown) == (0, 0, ())


WRITTEN = {
    "aten.mul (weight)": lambda w: w * torch.tensor([1.0, 0, 1, 0, 1, 0]),
    "aten.index (weight)": lambda w: w[torch.tensor([3, 1, 2, 0])],
}


@pytest.mark.parametrize("operator", WRITTEN)
def test_a_mask_or_an_order_written_as_numbers_is_known_or_else_reported(operator):
    net = nn.Linear(6, 4, bias=False)
    call = lambda x: linear(x, WRITTEN[operator](net.weight))  # noqa: E731
    table = measure(net, torch.ones(2, 6), call=call)
    assert (rows(table), table.unknown) == ({"weight": (24, 0, 24)}, ())
    net.to("meta")
    with torch.device("meta"):  # no operator shows there how such a tensor is made
        assert measure(net, torch.ones(2, 6), call=call).unknown == (operator,)


def test_a_detached_weight_is_found_and_has_no_gradient():
    net = nn.Linear(6, 4, bias=False)
    call = lambda x: linear(x, net.weight.detach())  # noqa: E731
    assert rows(measure(net, torch.ones(2, 6), call=call)) == {"weight": (24, 0, 0)}


@on_both_devices
def test_rows_of_a_weight_are_told_apart(device):
    with torch.device(device):
        net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 6)
    call = lambda x: torch.cat([linear(x, part) for part in net.weight.split([1, 3])], 1)  # noqa: E731
    assert rows(measure(net, x, call=call)) == {"weight[0:6]": (6, 0, 6), "weight[6:24]": (18, 0, 18)}
    call = lambda x: torch.bmm(net.weight[1:3].expand(2, 2, 6), x[:, :, None])  # noqa: E731
    assert rows(measure(net, x, call=call)) == {"weight[6:18]": (12, 0, 12)}


def test_rows_are_not_told_apart_once_they_are_turned_round():
    net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 6)
    table = measure(net, x, call=lambda x: linear(x, net.weight.flip(0)[:2]))
    assert rows(table) == {"weight": (12, 0, 12)}


def test_filters_are_told_apart_unless_they_lie_scattered_in_memory():
    net, x = nn.Conv2d(4, 6, 3), torch.ones(2, 4, 5, 5)
    call = lambda x: functional.conv2d(x, net.weight[:2])  # noqa: E731
    products = 2 * 4 * 9 * 9
    assert rows(measure(net, x, call=call)) == {"weight[0:72]": (products, 0, products)}
    columns = lambda x: functional.conv2d(x[:, :2], net.weight[:, :2])  # noqa: E731
    assert rows(measure(net, x, call=columns)) == {"weight": (6 * 2 * 9 * 9, 0, 6 * 2 * 9 * 9)}
    net.to(memory_format=torch.channels_last)
    assert rows(measure(net, x, call=call)) == {"weight": (products, 0, products)}


def test_a_weight_standardized_by_the_batch_norm_of_cudnn():
    def call(x):
        one = torch.ones(4)
        options = one, None, None, None, True, 0.0, 1e-5
        return linear(x, torch.ops.aten.cudnn_batch_norm(net.weight.view(1, 4, 6), *options)[0].view(4, 6))

    with torch.device("meta"):
        net, x = nn.Linear(6, 4, bias=False), torch.ones(2, 6)
        assert rows(measure(net, x, call=call)) == {"weight": (24, 0, 24)}


def test_autocast_casts_are_followed_also_from_its_cache():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        table = measure(net, torch.ones(2, 6), call=lambda x: net(x) + net(x))
    assert rows(table) == {"0.weight": (96, 0, 96), "2.weight": (64, 64, 64)}
    assert (table.other, table.unknown) == (0, ())


def test_a_shared_module_costs_each_of_its_uses():
    net = nn.Linear(6, 6)
    assert rows(measure(net, torch.ones(2, 6), call=lambda x: net(net(x)))) == {"weight": (72, 36, 72)}


@on_both_devices
def test_parameters_in_one_flat_buffer_are_told_apart(device):
    with torch.device(device):
        net, flat = nn.GRU(6, 8, bias=False), torch.ones(24 * 14)
        x = torch.ones(5, 3, 6)
    ih, hh = flat.split([24 * 6, 24 * 8])
    net.weight_ih_l0.data, net.weight_hh_l0.data = ih.view(24, 6), hh.view(24, 8)
    assert rows(measure(net, x, samples=3)) == {
        "weight_ih_l0": (5 * 24 * 6, 0, 5 * 24 * 6),
        "weight_hh_l0": (5 * 24 * 8, 4 * 24 * 8, 5 * 24 * 8),
    }
    both = lambda x: linear(x, flat.view(24, 14))  # noqa: E731
    assert costs(measure(net, torch.ones(1, 14, device=device), call=both)) == {
        "weight_ih_l0": 2 * 24 * 6,
        "weight_hh_l0": 2 * 24 * 8,
    }


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


@on_both_devices
def test_memory_that_held_numbers_or_noise_and_now_a_batch_holds_activations(device):
    with torch.device(device):
        net, x = bare(place=(3, 6), weight=(4, 6)), torch.ones(1, 3, 6)
        inputs = {
            "numbers": lambda x: torch.zeros(1, 3, 6).copy_(x),
            "noise": lambda x: torch.randn(1, 3, 6),
        }
        for make in inputs.values():
            call = lambda x: linear(make(x) + net["place"], net["weight"])  # noqa: B023, E731
            (layer,) = measure(net, x, call=call).layers
            assert (layer.key, layer.forward, layer.partner) == (
                "weight",
                144,
                "",
            )  # no product of two weights


# ------------------------------------------------------------------------- weights made of other weights


class Masked(nn.Module):
    """A layer that multiplies its weight by a mask in the forward pass."""

    def __init__(self, persistent):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        if persistent:
            self.register_buffer("mask", torch.ones(4, 6))
        else:
            self.mask = torch.ones(4, 6)

    def forward(self, x):
        return linear(x, self.weight * self.mask)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


def parametrized():
    net = nn.Linear(6, 6, bias=False)
    parametrize.register_parametrization(net, "weight", Symmetric())
    return net


def plain():
    return nn.Linear(6, 4, bias=False)


REPARAMETRIZED = {
    "masked": (lambda: Masked(True), "weight"),
    "weight norm": (lambda: parametrizations.weight_norm(plain()), "parametrizations.weight.original1"),
    "weight norm of columns": (
        lambda: parametrizations.weight_norm(plain(), dim=1),
        "parametrizations.weight.original1",
    ),
    "weight norm of everything": (
        lambda: parametrizations.weight_norm(plain(), dim=None),
        "parametrizations.weight.original1",
    ),
    "the older weight norm": (lambda: old_weight_norm(plain()), "weight_v"),
    "pruned": (lambda: prune.random_unstructured(plain(), "weight", 0.5), "weight_orig"),
    "parametrized": (parametrized, "parametrizations.weight.original"),
}


@on_both_devices
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_a_reparametrized_weight_costs_what_the_weight_costs(kind, device):
    build, name = REPARAMETRIZED[kind]
    with torch.device(device):
        net, x = build(), torch.ones(2, 6)
    size = net.get_parameter(name).numel()
    table = measure(net, x)
    assert rows(table) == {name: (size, 0, size)}
    assert (table.other, table.unknown) == (0, ())
    assert second_opinion(net, x, backward=True) == 2 * actual_step_cost(table)


@on_both_devices
def test_a_mask_that_is_no_buffer_is_reported_by_name(device):
    with torch.device(device):
        table = measure(Masked(False), torch.ones(2, 6))
    assert table.unknown == ("aten.mul (weight)",)
    assert (rows(table), table.other) == ({}, 2 * 24)  # at full density: it may be an activation


NORMS = {
    "new": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old": (old_spectral_norm, "weight_orig"),
}


@on_both_devices
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
def test_a_spectral_norm_multiplies_its_weight_three_times_more_and_one_of_these_has_a_gradient(kind, device):
    norm, name = NORMS[kind]
    with torch.device(device):
        net, x = norm(plain()), torch.ones(5, 6)
    table = measure(net, x, samples=1)
    assert rows(table) == {name: ((5 + 1) * 24, 0, (5 + 1) * 24)}
    assert without_gradient(table) == {name: 2 * 24}  # the power iteration
    assert (table.other, table.other_gradient) == (2 * 4, 2 * 4)  # u (W v)
    assert table.unknown == ()


@on_both_devices
def test_a_low_rank_update_beside_the_weight(device):
    with torch.device(device):
        net, x = bare(w=(4, 6), a=(2, 6), b=(4, 2)), torch.ones(3, 6)
    net["w"].requires_grad_(False)
    call = lambda x: linear(x, net["w"]) + linear(linear(x, net["a"]), net["b"])  # noqa: E731
    assert rows(measure(net, x, call=call)) == {"w": (24, 0, 0), "a": (12, 0, 12), "b": (8, 8, 8)}


@on_both_devices
def test_a_low_rank_update_merged_into_the_weight_is_scaled_by_both_factors(device):
    with torch.device(device):
        net, x = bare(w=(4, 6), a=(2, 6), b=(4, 2)), torch.ones(3, 6)
    call = lambda x: linear(x, net["w"] + 0.5 * net["b"] @ net["a"])  # noqa: E731
    table = measure(net, x, samples=1, call=call)
    merge = 4 * 2 * 6
    assert rows(table) == {"w": (72, 0, 72), "a": (merge, merge, merge)}
    assert {layer.name: layer.partner for layer in table.layers} == {"w": "", "a": "b"}
    assert forward_cost(table, {"w": 6, "a": 3, "b": 4}) == 2 * 72 + 2 * merge // 4 // 2
    assert second_opinion(net, x, call=call, backward=True) == actual_step_cost(table)


SUMS = {
    "two weights": lambda w, v: w + v,
    "a weight and another times a number": lambda w, v: torch.sub(w, v, alpha=0.5),
    "an average": lambda w, v: w.lerp(v, 0.1),
    "a weight and a number": lambda w, v: w + 1e-3,
    "a number less a weight": lambda w, v: 1 - w,
    "a weight without its mean": lambda w, v: standardized(w),
    "a weight without its mean, by a batch norm": lambda w, v: normalized_as_a_batch(w),
    "a weight and the same turned round": lambda w, v: w + w.flip(0),
    "a sum, then scaled": lambda w, v: (w + v)[:, 0:6].clone() * 2,
    "a copy to which another is added": lambda w, v: w.clone().add_(v),
    "a copy without its mean": lambda w, v: w.clone().sub_(w.mean(1, keepdim=True)),
    "a function that is not zero at zero": lambda w, v: w.exp(),
    "the same in place": lambda w, v: w.clone().sigmoid_(),
}


@on_both_devices
@pytest.mark.parametrize("kind", SUMS)
def test_a_weight_with_something_added_has_no_zeros(kind, device):
    with torch.device(device):
        net, x = bare(w=(4, 6), v=(4, 6)), torch.ones(2, 6)
    table = measure(net, x, call=lambda x: linear(x, SUMS[kind](net["w"], net["v"])))
    assert rows(table) == {"w": (24, 0, 24)}
    assert forward_cost(table, {"w": 6, "v": 3}) == 2 * 24


@on_both_devices
@pytest.mark.parametrize("place", [torch.addmm, lambda w, b, a: w.clone().addmm_(b, a)])
def test_a_product_added_to_a_weight_counts_and_fills_it(place, device):
    with torch.device(device):
        net, x = bare(w=(4, 6), a=(2, 6), b=(4, 2)), torch.ones(2, 6)
    table = measure(net, x, call=lambda x: linear(x, place(net["w"], net["b"], net["a"])), samples=1)
    assert {name: row[0] for name, row in rows(table).items()} == {"w": 2 * 24, "a": 48}
    assert forward_cost(table, {"w": 6}) == 2 * (2 * 24 + 48)


def test_a_weight_that_is_trained_in_place_keeps_its_zeros():
    net, x = plain(), torch.ones(2, 6)

    def call(x):
        net.weight.data.add_(torch.ones(4, 6))
        return net(x)

    assert forward_cost(measure(net, x, call=call), {"weight": 6}) == 2 * 6


@on_both_devices
def test_a_sum_of_the_same_elements_keeps_its_zeros(device):
    with torch.device(device):
        net, x = bare(w=(4, 6)), torch.ones(2, 6)
    call = lambda x: linear(x, torch.add(net["w"], net["w"].round() - net["w"], alpha=2))  # noqa: E731
    assert forward_cost(measure(net, x, call=call), {"w": 6}) == 2 * 6


@on_both_devices
def test_a_learned_query_times_a_weight_counts_for_the_weight(device):
    with torch.device(device):
        net, x = bare(query=(3, 6), weight=(4, 6)), torch.ones(2)
    table = measure(net, x, call=lambda x: linear(net["query"].expand(2, 3, 6), net["weight"]))
    assert rows(table) == {"weight": (72, 72, 72)}


@on_both_devices
def test_stacked_experts_are_told_apart(device):
    with torch.device(device):
        net, x = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3)), torch.ones(2, 6)
    stack = lambda: torch.stack([layer.weight for layer in net])  # noqa: E731
    every = lambda x: torch.bmm(x.expand(3, 2, 6), stack().transpose(1, 2))  # noqa: E731
    expected = {f"{i}.weight": (24, 0, 24) for i in range(3)}
    assert rows(measure(net, x, call=every)) == expected
    assert rows(measure(net, x, call=lambda x: [linear(x, w) for w in stack()])) == expected
    assert rows(measure(net, x, call=lambda x: linear(x, stack()[1]))) == {"1.weight": (24, 0, 24)}
    rest = lambda x: linear(x, torch.cat([layer.weight for layer in net])[2:6])  # noqa: E731
    assert rows(measure(net, x, call=rest)) == {"0.weight[12:24]": (12, 0, 12), "1.weight[0:12]": (12, 0, 12)}
    wide = lambda x: linear(x.repeat(1, 3), torch.cat([layer.weight for layer in net], 1))  # noqa: E731
    assert rows(measure(net, x, call=wide)) == expected
    row = lambda x: linear(x.repeat(1, 3), torch.cat([layer.weight for layer in net], 1)[1:2])  # noqa: E731
    assert rows(measure(net, x, call=row)) == {f"{i}.weight": (6, 0, 6) for i in range(3)}


@on_both_devices
def test_functional_calls_by_themselves_and_mapped(device):
    with torch.device(device):
        net, layer = bare(weight=(3, 4, 6)), nn.Linear(6, 4, bias=False)
        x, each = torch.ones(2, 6), torch.ones(3, 2, 6)
        own = {"weight": net["weight"][1]}
        assert rows(measure(net, x, call=lambda x: functional_call(layer, own, x))) == {
            "weight[24:48]": (24, 0, 24)
        }
        mapped = torch.vmap(lambda w, x: functional_call(layer, {"weight": w}, x))
        table = measure(net, each, samples=2, call=lambda x: mapped(net["weight"], x))
        assert rows(table) == {"weight": (72, 0, 72)}
        assert rows(measure(layer, each, samples=2, call=torch.vmap(layer))) == {"weight": (72, 0, 72)}
        convolution = nn.Conv1d(6, 4, 2)
        images = torch.ones(3, 2, 6, 2)
        assert rows(measure(convolution, images, samples=2, call=torch.vmap(convolution))) == {
            "weight": (144, 0, 144)
        }


# -------------------------------------------------------------------------- nothing passes unreported

mask = torch.ones(4, 6)  # known to no module
ids = torch.tensor([3, 1, 2, 0])

REPORTED = {
    "aten.mul (weight)": lambda w, x: linear(x, w * mask),
    "aten.where (weight)": lambda w, x: linear(
        x.double(), torch.cat([torch.where(mask > 0, w, 0) * mask]).double()
    ),
    "aten.cat (weight)": lambda w, x: linear(x, torch.cat([w, mask])),
    "aten.index (weight)": lambda w, x: linear(x, w[ids]),
    "aten._softmax (weight)": lambda w, x: linear(x, w.softmax(0)),
    "aten.kthvalue (weight)": lambda w, x: linear(x, w * (w >= w.flatten().kthvalue(9).values)),
    "aten._euclidean_dist (weight)": lambda w, x: torch.cdist(x.expand(30, 6), w),
    "aten._foreach_mul (weight)": lambda w, x: linear(x, torch._foreach_mul([w], 2.0)[0]),
}


@pytest.mark.parametrize("operator", REPORTED)
def test_an_operator_that_computes_with_a_weight_is_reported_by_name(operator):
    net, x = plain(), torch.ones(1, 6)
    assert measure(net, x, call=lambda x: REPORTED[operator](net.weight, x)).unknown == (operator,)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_a_contraction_written_element_by_element_is_reported(reduce, samples):
    net, x = plain(), torch.ones(samples, 6)
    table = measure(net, x, call=lambda x: reduce(x[:, None] * net.weight, -1))
    assert table.unknown == ("aten.mul (weight)",)


def modulated(w, style, x, normed):
    """A convolution whose filters are scaled by each sample (StyleGAN2)."""
    filters = w[None] * style[:, None, :, None, None]
    if normed:
        filters = filters * filters.square().sum((2, 3, 4), keepdim=True).rsqrt()
    return functional.conv2d(x.reshape(1, 6, 5, 5), filters.reshape(8, 3, 3, 3), groups=2)


@pytest.mark.parametrize("normed", [False, True])
def test_filters_that_are_scaled_by_each_sample_are_reported(normed):
    net, x = bare(weight=(4, 3, 3, 3)), torch.ones(2, 3, 5, 5)
    table = measure(net, x, call=lambda x: modulated(net["weight"], torch.ones(2, 3), x, normed))
    assert "aten.mul (weight)" in table.unknown
    assert table.other == 2 * 4 * 27 * 9


MADE = {
    "aten.mul (a)": lambda a, b, x: linear(x, torch.kron(a, b)),
    "aten.native_layer_norm (a)": lambda a, b, x: linear(x[:, :3], functional.layer_norm(a, (3,))),
    "aten.sum (a)": lambda a, b, x: x[:, :3] @ a.sum(0),
}


@pytest.mark.parametrize("operator", MADE)
def test_what_is_made_of_parameters_alone_and_is_none_of_them_is_reported_at_its_product(operator):
    net, x = bare(a=(2, 3), b=(2, 2)), torch.ones(2, 6)
    table = measure(net, x, call=lambda x: MADE[operator](net["a"], net["b"], x))
    assert operator in table.unknown


def test_a_scale_per_channel_before_a_mean_is_no_contraction():
    net, x = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "scale": bare(c=(4, 1, 1))}), torch.ones(2, 3, 5, 5)
    assert measure(net, x, call=lambda x: (net["scale"]["c"] * net["conv"](x)).mean((2, 3))).unknown == ()


def test_the_operators_that_make_an_orthogonal_weight_are_reported():
    unknown = measure(parametrizations.orthogonal(nn.Linear(6, 6)), torch.ones(2, 6)).unknown
    assert unknown == ("aten.linalg_matrix_exp (parametrizations.weight.original)",)


def test_unknown_operators_are_reported_in_evaluation_too():
    net = plain()
    call = torch.no_grad()(lambda x: linear(x, net.weight.softmax(0)))
    assert measure(net, torch.ones(2, 6), call=call, inference=True).unknown == ("aten._softmax (weight)",)


QUIET = {
    "a position": lambda w, x: x.expand(3, 4, 6) + w,
    "a class token": lambda w, x: torch.cat([w.expand(3, 4, 6), x.expand(3, 4, 6)], 1),
    "a scale per channel": lambda w, x: x.expand(3, 4, 6) * w,
    "a scale, then the loss": lambda w, x: (x.expand(3, 4, 6) * w).mean(),
    "a mask token": lambda w, x: torch.where(torch.ones(3, 4, 6) > 0, x.expand(3, 4, 6), w),
    "a norm over two dimensions": lambda w, x: functional.layer_norm(x.expand(3, 4, 6), (4, 6), w),
    "a lookup": lambda w, x: w[ids] + functional.embedding(ids, w),
    "the shape of a weight": lambda w, x: (
        torch.zeros_like(w) + torch.empty_like(w).fill_(0) + w.new_zeros(4, 6)
    ),
    "a running average": lambda w, x: w.data.mul_(0.9).add_(x.detach().mean()),
    "a question": lambda w, x: torch.equal(w, w) and w.shape == w.t().shape,
    "a check": lambda w, x: torch.isfinite(w).all() and w.abs().amax() < 2,
    "a penalty": lambda w, x: w.square().sum() + w.norm() + (w - mask).abs().mean(),
}


@pytest.mark.parametrize("use", QUIET)
def test_what_flop_counts_leave_out_is_not_reported(use):
    net = bare(weight=(4, 6))
    table = measure(net, torch.ones(1, 6), call=lambda x: QUIET[use](net["weight"], x))
    assert (table.layers, table.other, table.unknown) == ((), 0, ())


def test_what_is_read_without_gradients_is_not_reported():
    net = bare(weight=(4, 6))
    call = torch.no_grad()(lambda x: net["weight"].abs().flatten().topk(5))
    assert measure(net, torch.ones(1, 6), call=call).unknown == ()


def test_a_position_is_not_taken_for_a_weight_in_a_batch_of_one():
    net, x = bare(place=(3, 6), weight=(4, 6)), torch.ones(1, 3, 6)
    call = lambda x: linear(functional.dropout(x + net["place"]).relu(), net["weight"])  # noqa: E731
    table = measure(net, x, call=call)
    assert (rows(table), table.unknown) == ({"weight": (72, 72, 72)}, ())


def test_a_scale_in_front_of_attention_is_not_taken_for_a_weight():
    net, x = bare(scale=(3, 6)), torch.ones(2, 3, 6)
    table = measure(net, x, call=lambda x: (x * net["scale"]) @ x.transpose(1, 2))
    assert (table.other, table.unknown) == (2 * 3 * 3 * 6, ())


def test_biases_and_norms_are_not_reported():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Flatten())
    table = measure(net, torch.ones(2, 3, 5, 5))
    assert (list(rows(table)), table.unknown) == (["0.weight"], ())


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


# ------------------------------------------------------------------------------ what is part of training


def test_the_backward_pass_is_not_counted():
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.ones(2, 6)
    assert measure(net, x, backward=True) == measure(net, x)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_is_booked_apart(mode, frozen):
    net, x = plain().requires_grad_(not frozen), torch.ones(2, 6)
    assert rows(measure(net, x)) == {"weight": (24, 0, 24 * (not frozen))}
    table = measure(net, x, call=mode()(net))
    assert (rows(table), without_gradient(table)) == ({}, {"weight": 24})
    assert (forward_cost(table), actual_step_cost(table, {"weight": 12})) == (0, 2 * 12)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.to(w.dtype) @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


times = Times.apply  # bound before any measurement


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_custom_function_without_gradients_is_booked_apart(mode):
    net, x = plain(), torch.ones(2, 6)
    table = measure(net, x, call=mode()(lambda x: times(x, net.weight)))
    assert (rows(table), without_gradient(table)) == ({}, {"weight": 24})
    assert rows(measure(net, x, call=lambda x: times(x, net.weight))) == {"weight": (24, 0, 24)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_repeats_of_a_custom_function_is_counted(reentrant):
    net, x = plain(), torch.ones(2, 6, requires_grad=True)
    call = lambda x: checkpoint(lambda x: times(x, net.weight), x, use_reentrant=reentrant)  # noqa: E731
    table = measure(net, x, call=call, backward=True)
    assert (rows(table), table.layers[0].recompute) == ({"weight": (24, 24, 24)}, 2 * 24)


def test_attention_without_gradients_is_booked_apart():
    x = torch.ones(2, 3, 6)
    table = measure(nn.Identity(), x, call=torch.no_grad()(lambda x: x @ x.transpose(1, 2)))
    assert (table.other, table.other_no_gradient) == (0, 2 * 3 * 3 * 6)
    assert actual_step_cost(table) == table.other_no_gradient


def test_a_copy_of_a_frozen_weight_made_without_gradients_is_known_later():
    net, x = plain().requires_grad_(False), torch.ones(2, 6, dtype=torch.double, requires_grad=True)

    def call(x):
        with torch.no_grad():
            weight = net.weight.double()
        return linear(x, weight)

    assert rows(measure(net, x, call=call)) == {"weight": (24, 24, 0)}


def test_nothing_in_inference_mode_is_part_of_training():
    net, x = nn.Sequential(nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(4, 2)), torch.ones(2, 6, 3)
    with torch.inference_mode():
        assert rows(measure(net, x)) == {}
        assert without_gradient(measure(net, x)) == {"0.weight": 72, "2.weight": 8}
        table = measure(net, x, inference=True)
    assert costs(table) == {"0.weight": 2 * 72, "2.weight": 2 * 8}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_that_follows_the_student_has_only_a_forward_pass(frozen):
    net, x = nn.ModuleDict({"teacher": plain(), "student": plain()}), torch.ones(2, 6)
    net["teacher"].requires_grad_(not frozen)

    def call(x):
        with torch.no_grad():
            net["teacher"].weight.lerp_(net["student"].weight, 0.1)
            target = net["teacher"](x)
        return (net["student"](x) - target).square()

    table = measure(net, x, call=call)
    assert rows(table) == {"student.weight": (24, 0, 24)}
    assert without_gradient(table) == {"teacher.weight": 24}


def test_an_optimizer_step_inside_is_not_counted():
    net, x = plain(), torch.ones(2, 6)
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
    assert (rows(table), table.other, table.unknown) == ({"weight": (24, 0, 24)}, 0, ())


# ----------------------------------------------------------------------------------------- per sample


def test_costs_are_per_sample_or_of_all_samples_where_these_do_not_divide_them():
    net = nn.Linear(1, 1, bias=False)
    tables = [measure(net, torch.ones(n, 1), samples=4) for n in (4, 5, 6, 7)]
    assert [(costs(table)["weight"], table.samples) for table in tables] == [
        (2, 1),
        (10, 4),
        (12, 4),
        (14, 4),
    ]
    assert [costs(table.per_sample())["weight"] for table in tables] == [2, 3, 3, 4]  # to the nearest


@pytest.mark.parametrize("samples", [0, -1])
def test_an_empty_batch_cannot_be_divided_by(samples):
    with pytest.raises(ValueError, match="at least 1"):
        Tracer({}).table(samples)


def test_a_parameter_without_a_product_has_no_row():
    net = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    assert list(rows(measure(net, torch.ones(2, 6), call=net["used"]))) == ["used.weight"]


def test_a_layer_without_inputs_costs_nothing():
    net = bare(weight=(4, 0))
    table = measure(net, torch.ones(2, 0), call=lambda x: linear(x, net["weight"]))
    assert (costs(table), table.unknown) == ({"weight": 0}, ())


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
