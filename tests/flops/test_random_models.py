"""Random small models against a formula by hand that follows shapes, at random densities.

The formula knows nothing of the package: each layer states its positions, and whether something before it is
trained decides about the gradient of its input. Torch's own counter is asked too, where it is right.
"""

from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_rigl.flops.formulas import actual_step_cost, forward_cost
from tests.flops.measuring import costs, measure, second_opinion


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class OverTime(First):
    """A module of (batch, channels, time) on (batch, time, channels)."""

    def forward(self, x):
        return self.module(x.transpose(1, 2)).transpose(1, 2)


class SelfAttention(First):
    def forward(self, x):
        return self.module(x, x, x, need_weights=False)[0]


class Scores(nn.Module):
    """Attention without weights."""

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class ToSequence(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class ToVector(nn.Module):
    def forward(self, x):
        return x.mean(1)


@dataclass
class Model:
    """What is built so far, and what it costs per sample."""

    shape: tuple[int, ...]  # of one sample
    live: bool  # does something so far require a gradient?
    modules: list[nn.Module] = field(default_factory=list)
    # name -> connections, and how often each takes part in: the pass, input gradients, weight gradients
    weights: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    other: int = 0  # multiply-adds without a parameter, and those of their gradients
    other_gradient: int = 0
    torch_is_right: bool = True

    def add(self, module, shape, trained, *weights):
        """A module; its weights are (name, connections, positions, and of the input gradients)."""
        place = len(self.modules)
        self.modules.append(module.requires_grad_(trained))
        self.shape, self.live = shape, self.live or (trained and any(True for _ in module.parameters()))
        for name, size, positions, back in weights:
            self.weights[f"{place}.{name}"] = size, positions, back, positions * trained

    def attend(self, length, width, live):
        products = 2 * length * length * width
        self.other, self.other_gradient = self.other + products, self.other_gradient + 2 * products * live


# --------------------------------------------------------------------- one layer: drawn, built and counted

small = st.integers(1, 4)


def convolution(draw, model, trained):
    channels, *size = model.shape
    groups = draw(st.sampled_from([g for g in (1, 2, 4, channels) if channels % g == 0]))
    outputs = groups * draw(small)
    kernel, stride, padding, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 2), small))
    sides = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]
    if min(n + 2 * padding - dilation * (kernel - 1) for n in size) < 1:
        return
    kind = nn.Conv2d if len(size) == 2 else nn.Conv3d
    layer = kind(channels, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    connections = outputs * (channels // groups) * kernel ** len(size)
    positions = torch.Size(sides).numel()
    model.torch_is_right &= groups == 1
    weight = "weight", connections, positions, positions * model.live
    model.add(layer, (outputs, *sides), trained, weight)


def transposed_convolution(draw, model, trained):
    channels, *size = model.shape
    groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    outputs, kernel, stride = groups * draw(small), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    if max(size) > 12:
        return
    kind = nn.ConvTranspose2d if len(size) == 2 else nn.ConvTranspose3d
    connections, positions = channels * (outputs // groups) * kernel ** len(size), torch.Size(size).numel()
    model.torch_is_right &= groups == 1
    weight = "weight", connections, positions, positions * model.live
    sides = [(n - 1) * stride + kernel for n in size]
    model.add(kind(channels, outputs, kernel, stride, groups=groups), (outputs, *sides), trained, weight)


def norm_of_channels(draw, model, trained):
    kind = nn.BatchNorm2d if len(model.shape) == 3 else nn.BatchNorm3d
    model.add(kind(model.shape[0]), model.shape, trained)


def linear(draw, model, trained):
    *size, width = model.shape
    outputs, positions = draw(small), torch.Size(size).numel()
    weight = "weight", width * outputs, positions, positions * model.live
    model.add(nn.Linear(width, outputs, bias=draw(st.booleans())), (*size, outputs), trained, weight)


def norm_of_width(draw, model, trained):
    model.add(nn.LayerNorm(model.shape[-1]), model.shape, trained)


def convolution_over_time(draw, model, trained):
    time, width = model.shape
    outputs, kernel = draw(small), draw(st.integers(1, 3))
    padding, stride = kernel // 2, draw(st.integers(1, 2))
    steps = (time + 2 * padding - kernel) // stride + 1
    if steps < 1:
        return
    layer = OverTime(nn.Conv1d(width, outputs, kernel, stride, padding))
    weight = "module.weight", width * outputs * kernel, steps, steps * model.live
    model.add(layer, (steps, outputs), trained, weight)


def recurrent(draw, model, trained):
    time, width = model.shape
    kind, gates = draw(st.sampled_from([(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)]))
    hidden, depth, directions = draw(small), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layer = kind(width, hidden, depth, bidirectional=directions == 2, batch_first=True)
    weights, inside = [], model.live or trained
    for level in range(depth):
        inputs = hidden * directions if level else width
        live = inside if level else model.live
        for suffix in ("", "_reverse")[:directions]:
            name = f"l{level}{suffix}"
            weights.append((f"module.weight_ih_{name}", gates * hidden * inputs, time, time * live))
            # the first state is no result of anything
            weights.append((f"module.weight_hh_{name}", gates * hidden * hidden, time, (time - 1) * inside))
    model.add(First(layer), (time, hidden * directions), trained, *weights)


def self_attention(draw, model, trained):
    time, width = model.shape
    inside = model.live or trained
    model.attend(time, width, inside)
    packed = "module.in_proj_weight", 3 * width * width, time, time * model.live
    outside = "module.out_proj.weight", width * width, time, time * inside
    heads = draw(st.sampled_from([h for h in (1, 2) if width % h == 0]))
    attention = nn.MultiheadAttention(width, heads, batch_first=True)
    model.add(SelfAttention(attention), model.shape, trained, packed, outside)


def scores(draw, model, trained):
    model.attend(*model.shape, model.live)
    model.add(Scores(), model.shape, trained)


def activation(draw, model, trained):
    model.add(draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Dropout, nn.PReLU]))(), model.shape, trained)


ON_IMAGES = [convolution, convolution, transposed_convolution, norm_of_channels, activation]
ON_SEQUENCES = [linear, convolution_over_time, recurrent, self_attention, scores, norm_of_width, activation]
ON_VECTORS = [linear, linear, norm_of_width, activation]


def grow(draw, model, kinds):
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)):
        kind(draw, model, trained=draw(st.integers(0, 3)) > 0)


INPUTS = {
    "images": (3, 8, 9),
    "volumes": (2, 4, 5, 4),
    "words": (6,),
    "sequence": (6, 4),
    "vector": (7,),
}


@st.composite
def models(draw):
    """Images or words -> a sequence -> a vector, with random layers at each stage; and the input."""
    start = draw(st.sampled_from(list(INPUTS)))
    shape, words = INPUTS[start], start == "words"
    model = Model(shape, live=draw(st.booleans()) and not words)
    x = torch.zeros((2, *shape), dtype=torch.long if words else None, requires_grad=model.live)
    if start in ("images", "volumes"):
        grow(draw, model, ON_IMAGES)
        channels, *size = model.shape
        model.add(ToSequence(), (torch.Size(size).numel(), channels), False)
    if words:
        model.add(nn.Embedding(11, 4), (*shape, 4), draw(st.booleans()))
    if start != "vector":
        if model.shape[0] <= 64:
            grow(draw, model, ON_SEQUENCES)
        model.add(ToVector(), model.shape[1:], False)
    grow(draw, model, ON_VECTORS)
    if words and model.shape == (4,):
        head, trained = nn.Linear(4, 11, bias=False), model.modules[0].weight.requires_grad
        head.weight = model.modules[0].weight  # tied: known by its first name
        model.weights["0.weight"] = 44, 1, int(model.live), int(trained)
        model.add(head, (11,), trained)
    return model, x


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.randoms(use_true_random=False))
def test_a_random_model_costs_what_the_formula_says_at_any_density(data, random):
    with torch.device("meta"):
        model, x = data.draw(models())
    net = nn.Sequential(*model.modules)
    table = measure(net, x)
    products = {name: size * positions for name, (size, positions, _, _) in model.weights.items()}
    assert costs(table) == {name: 2 * macs for name, macs in products.items() if macs}
    assert (table.other, table.other_gradient) == (2 * model.other, 2 * model.other_gradient)
    assert table.unknown == ()

    active = {name: random.randint(0, size) for name, (size, *_) in model.weights.items()}
    rows = [(active[name], *row) for name, row in model.weights.items()]
    assert forward_cost(table, active) == 2 * (model.other + sum(a * n for a, _, n, _, _ in rows))
    step = model.other + model.other_gradient + sum(a * (n + back) for a, _, n, back, _ in rows)
    sparse = sum(a * gradient for a, _, _, _, gradient in rows)
    dense = sum(size * gradient for _, size, _, _, gradient in rows)
    assert actual_step_cost(table, active) == 2 * (step + sparse)
    assert actual_step_cost(table, active, dense_gradient=True) == 2 * (step + dense)

    assert second_opinion(net, x) == 2 * forward_cost(table)
    if model.torch_is_right and model.live:
        assert second_opinion(net, x, backward=True) == 2 * actual_step_cost(table)
