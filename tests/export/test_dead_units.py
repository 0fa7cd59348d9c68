"""Through what `compact` follows the units of a model, and what it leaves whole."""

import operator
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lightning_rigl.export.compaction import compact
from tests.export.compact_networks import Residual, cut


def check(model, *example, inputs=None, density=0.15, seed=1):
    """The model is cut and compacted; the outputs must be equal, on other inputs too."""
    model = cut(model, density, seed).double().eval()
    example = tuple(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in example
    )
    small = compact(model, example)
    for given in (example, inputs or example):
        torch.testing.assert_close(small(*given), model(*given), rtol=1e-11, atol=1e-11)
    return small


class Call(nn.Module):
    """Layers a (6 -> 12) and b (12 -> 5), and what a test does with them."""

    def __init__(self, how, **more):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 12), nn.Linear(12, 5), how
        for name, part in more.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


X = torch.randn(3, 4, 6)  # samples, places, features


def hidden(small, name="a"):
    return small.get_submodule(name).out_features


FOLLOWED = {
    "functions": lambda s, x: s.b(torch.tanh(functional.gelu(s.a(x), approximate="tanh") * 2 - 1)),
    "in place": lambda s, x: s.b(functional.relu_(s.a(x)).add_(1).clamp_(max=3)),
    "in place, read before": lambda s, x: (lambda h: s.b(functional.relu(h, True) + h))(s.a(x)),
    "operators": lambda s, x: s.b(operator.iadd(s.a(x), 1) ** 2 / 3),
    "transposed and back": lambda s, x: s.b(s.a(x).transpose(1, 2).permute(0, 2, 1).contiguous()),
    "mean": lambda s, x: s.b(s.a(x).mean(1)),
    "mean, kept": lambda s, x: s.b(s.a(x).mean(dim=(1,), keepdim=True).squeeze(1)),
    "maximum": lambda s, x: s.b(s.a(x).relu().amax(1)),
    "one place": lambda s, x: s.b(s.a(x)[:, 0]),
    "some places": lambda s, x: s.b(s.a(x)[:, 1::2, :].unsqueeze(1)),
    "places and samples as one": lambda s, x: s.b(s.a(x).reshape(-1, 12).relu().view(x.shape[0], -1, 12)),
    "sizes of the input": lambda s, x: s.b(s.a(x).view(x.size(0), x.size(1), 12)),
    "sizes of the units": lambda s, x: (lambda h: s.b(h.view(h.size(0), h.shape[1], h.shape[2])))(s.a(x)),
    "size as a tuple": lambda s, x: s.b(torch.reshape(s.a(x), (3, 4, 12))),
    "added to themselves": lambda s, x: (lambda h: s.b(h + h.sigmoid()))(s.a(x)),
    "behind each other": lambda s, x: s.c(torch.cat([s.a(x), s.a(x).relu()], -1)),
    "beside each other": lambda s, x: s.b(torch.cat([s.a(x), s.a(x).relu()], 1)),
    "flattened with the places": lambda s, x: s.d(s.a(x).flatten(1)),
    "a factor for each": lambda s, x: s.b(s.a(x) * s.gamma + s.gamma),
    "dropout": lambda s, x: s.b(functional.dropout(s.a(x), 0.5, s.training)),
    "dtype": lambda s, x: s.b(s.a(x).float().to(torch.float64)),
    "a number of dimensions": lambda s, x: s.b(s.a(x) / x.dim()),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_followed(how):
    gamma = nn.Parameter(torch.arange(12.0) % 4)
    parts = {"c": nn.Linear(24, 5), "d": nn.Linear(48, 5), "gamma": gamma}
    small = check(Call(FOLLOWED[how], **parts), X)
    assert hidden(small) < 12
    assert "a" not in small.report.left


@pytest.mark.parametrize(
    "how",
    [
        lambda s, x: s.b(torch.cat([s.a(x), s.a2(x)], 1)),
        lambda s, x: s.b(s.a(x).view(x.size(0), 4, s.a2(x).size(-1))) + s.b2(s.a2(x)),
    ],
    ids=["beside each other", "one has the size of the other"],
)
def test_units_of_two_layers_that_stay_or_go_together(how):
    model = Call(how, a2=nn.Linear(6, 12), b2=nn.Linear(12, 5)).double()
    with torch.no_grad():
        for layer in (model.b, model.b2):
            layer.weight[:, 8:] = 0  # what no one reads goes from both
        model.a.weight[0] = 0  # a constant in one of them stays in both
    small = compact(model, X.double())
    assert hidden(small) == hidden(small, "a2")
    assert hidden(small) in (8, 12)
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-11, atol=1e-11)


def test_who_reads_a_tensor_after_a_step_in_place_reads_its_result():
    def how(s, x):
        h = s.a(x)
        once = functional.relu(h, inplace=True)
        return s.b(once + h)

    model = Call(how).double()
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0, -3  # the constant is ReLU(-3) twice, not ReLU(-3) - 3
    small = compact(model, X.double())
    assert hidden(small) == 11
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-11, atol=1e-11)


LEFT = {
    "softmax": (lambda s, x: s.b(s.a(x).softmax(-1)), "softmax"),
    "layer norm": (lambda s, x: s.b(functional.layer_norm(s.a(x), (12,))), "layer_norm"),
    "norm as a module": (lambda s, x: s.b(s.norm(s.a(x))), r"norm \(LayerNorm\)"),
    "split": (lambda s, x: s.e(s.a(x).view(3, 4, 3, 4)), "view"),
    "halves": (lambda s, x: s.e(s.a(x).chunk(3, -1)[0]), "chunk"),
    "a few of them": (lambda s, x: s.e(s.a(x)[..., :4]), "getitem"),
    "sum over them": (lambda s, x: s.b(s.a(x) - s.a(x).mean(-1, keepdim=True)), "mean"),
    "their number": (lambda s, x: s.b(s.a(x) / s.a(x).shape[-1]), "truediv"),
    "their shape": (lambda s, x: s.b(s.a(x).sin() + torch.ones(s.a(x).shape).double()), "ones"),
    "met by a stranger": (lambda s, x: s.b(s.a(x) + x.repeat(1, 1, 2)), "add"),
    "read along another axis": (lambda s, x: s.e(s.a(x).transpose(1, 2)), "another axis"),
    "random": (lambda s, x: s.b(functional.dropout(s.a(x), 0.0)), "random"),
    "a weight by name": (lambda s, x: functional.linear(s.a(x), s.b.weight), "linear"),
    "a loop": (lambda s, x: s.b(torch.stack([s.a(x)]).sum(0)), "stack"),
}


@pytest.mark.parametrize("how", LEFT)
def test_left_whole_with_the_reason(how):
    how, why = LEFT[how]
    parts = {"norm": nn.LayerNorm(12), "e": nn.Linear(4, 5)}
    small = check(Call(how, **parts), X)
    assert hidden(small) == 12
    assert re.search(why, small.report.left["a"])


def test_units_that_only_feed_each_other_are_dead():
    """A channel of the residual stream that the head does not read, written by the blocks that read it."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = x + self.block(x).relu()
            return self.head(x)

    model = Stream()
    with torch.no_grad():
        model.head.weight[:, 4:] = 0  # channels 4 and 5 are read by the block only
        model.block.weight[:4, 4:] = 0  # which writes what it reads there to 4 and 5 only
    small = compact(model, torch.randn(1, 4))
    assert small.block.weight.shape == (4, 4)
    assert small.stem.out_features == small.head.in_features == 4
    x = torch.randn(5, 4)
    torch.testing.assert_close(small(x), model(x))


def test_a_module_called_twice_is_cut_once_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.h, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.h(self.h(self.a(x).relu()).relu()).relu())

    for seed in range(8):
        check(Twice(), torch.randn(4, 6), density=0.4, seed=seed)


def test_a_constant_that_differs_between_two_calls_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(h) + self.b(h + 1)

    model = Twice().double()
    with torch.no_grad():
        model.a.weight[0] = 0
    small = compact(model, torch.zeros(1, 2).double())
    assert small.b.in_features == 2
    x = torch.randn(3, 2).double()
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_tied_weights_stay_whole_and_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 12), nn.Linear(12, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i):
            return self.head(self.b(self.a(self.table(i)).relu()))

    small = check(Tied(), torch.randint(20, (2, 5)), inputs=(torch.randint(20, (3, 5)),))
    assert small.head.weight is small.table.weight
    assert small.head.weight.shape == (20, 16)
    assert small.a.out_features < 12
    assert "shares its weight" in small.report.left["head"]


def test_columns_of_an_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 12)

        def forward(self, i):
            return self.a(self.table(i).mean(1))

    model = cut(Words(), 0.1, 1)
    with torch.no_grad():
        model.table.weight.uniform_()
        model.table.weight[:, 3] = 7  # the same in every row: goes into the bias
        model.a.weight[:, 3] = 1
    small = compact(model, torch.randint(20, (2, 5)))
    read = (model.a.weight != 0).any(0)
    assert small.table.embedding_dim == small.a.in_features == int(read.sum()) - 1
    i = torch.randint(20, (4, 5))
    torch.testing.assert_close(small(i), model(i))


class Block(nn.Module):
    """A block of a transformer, written by hand."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x, mask=None, *, scale: float = 1.0):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(y) * scale
        return x + self.mlp(self.norm2(x))


def test_of_a_transformer_block_the_hidden_units_go_and_the_stream_stays():
    model = nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.LayerNorm(16), nn.Linear(16, 3))
    small = check(model, torch.randn(2, 5, 8), inputs=(torch.randn(3, 7, 8).double(),))
    assert small.get_submodule("1.mlp.0").out_features < 64
    assert small.get_submodule("1.qkv").weight.shape == (48, 16)
    assert small.report.left["1.norm1"] == "LayerNorm stays whole"
    assert "view" in small.report.left["1.qkv"]


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_hidden_units_inside_the_transformer_layers_of_torch(activation):
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, activation=activation)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    small = check(model, torch.randn(2, 5, 16))
    with torch.no_grad():  # the fused inference kernel
        x = torch.randn(2, 5, 16).double()
        torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(inner.linear1.out_features < 64 for inner in small.get_submodule("0").layers)
    assert "but for its feed-forward units" in small.report.left["0"]


def test_a_bare_layer_of_torch():
    small = check(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), torch.randn(2, 5, 16))
    assert small.get_submodule("0").linear1.out_features < 64
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[:, 1] = 0
    assert compact(model, torch.randn(1, 4)).get_submodule("0").in_features == 3


def test_recurrent_layers_stay_whole():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lstm, self.b, self.c = (
                nn.Linear(4, 6),
                nn.LSTM(6, 5),
                nn.Linear(5, 9),
                nn.Linear(9, 2),
            )

        def forward(self, x):
            out, (last, _) = self.lstm(self.a(x))
            return self.c(self.b(out[-1] + last[0]).relu())

    small = check(Recurrent(), torch.randn(3, 2, 4))
    assert small.report.left["lstm"] == "LSTM stays whole"
    assert hidden(small, "a") == 6
    assert hidden(small, "b") < 9


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


def test_a_model_that_decides_by_values_is_refused_in_words():
    with pytest.raises(ValueError, match=r"Decides.forward cannot be followed.*Compact the submodules"):
        compact(Decides(), torch.randn(2, 4))


def test_a_submodule_that_decides_by_values_is_left_whole():
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Sequential(Decides()), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    small = check(model, torch.randn(2, 6), inputs=(-torch.randn(5, 6).double(),))
    assert "cannot be followed" in small.report.left["1.0"]
    assert hidden(small, "0") == 4
    assert hidden(small, "2") < 8


def test_arguments_that_are_not_given_are_fixed_at_their_defaults():
    small = check(Block(), torch.randn(2, 5, 16))
    with pytest.raises(TypeError):
        small(torch.randn(2, 5, 16), torch.ones(5, 5).bool())
    mask = torch.ones(5, 5).tril().bool()
    masked = check(Block(), torch.randn(2, 5, 16), mask)
    assert masked.get_submodule("mlp.0").out_features < 64


def test_inputs_and_outputs_in_containers():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 2)

        def forward(self, batch):
            h = self.a(batch["x"]).relu()
            return {"y": self.b(h), "features": [h[:, :3], batch["x"]]}

    model = cut(Batch(), 0.2)
    x = {"x": torch.randn(2, 6), "name": "digits"}
    small, expected = compact(model, x), model(x)
    assert torch.equal(small(x)["features"][1], expected["features"][1])
    torch.testing.assert_close(small(x)["y"], expected["y"])
    assert hidden(small) == 9  # a part of it is shown


@pytest.mark.parametrize("between", [nn.AvgPool2d(3, 1, 1), nn.ZeroPad2d(1)])
def test_a_constant_channel_is_none_after_a_step_that_lets_zeros_in_at_the_border(between):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), between, nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, torch.tensor([3.0, 0.0])  # 3 stays, 0 goes
    x = torch.randn(2, 2, 5, 5).double()
    small = compact(model, x)
    assert small.get_submodule("0").out_channels == 3
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_shown_units_stay():
    model = Call(lambda s, x: (s.b(s.a(x).relu()), s.a(x)))
    assert hidden(check(model, X)) == 12


def test_hooks_and_parametrizations():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 2)
    )
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[2].parametrizations.weight.original[:, 2:5] = 0
    model.eval()
    small = compact(model, torch.randn(1, 4))
    assert type(small.get_submodule("2")) is nn.Linear
    assert small.get_submodule("2").in_features == 3
    assert torch.nn.utils.parametrize.is_parametrized(model[2])
    x = torch.randn(5, 4)
    torch.testing.assert_close(small(x), model(x))
    hooked = cut(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.3)
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    small = compact(hooked, torch.randn(1, 4))
    assert hidden(small, "0") == 8
    torch.testing.assert_close(small(x), hooked(x))


def test_a_subclass_that_changes_forward_is_looked_into():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Named(nn.Linear):
        pass

    small = check(nn.Sequential(Named(6, 9), Twice(9, 9), nn.Linear(9, 2)), torch.randn(3, 6))
    assert isinstance(small.get_submodule("0"), Named)
    assert hidden(small, "0") == 9


def test_wrappers_of_compilation_are_taken_off():
    model = cut(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 0.2)
    small = compact(torch.compile(model, backend="eager"), torch.randn(1, 4))
    assert hidden(small, "0") < 8
    assert set(dict(small.named_parameters())) == set(dict(model.named_parameters()))


def test_batch_norm_of_linear_layers_and_without_statistics():
    for norm in (
        nn.BatchNorm1d(9),
        nn.BatchNorm1d(9, affine=False),
        nn.BatchNorm1d(9, track_running_stats=False),
    ):
        if norm.running_mean is None:
            norm.register_buffer("running_mean", None)
        model = nn.Sequential(nn.Linear(6, 9), norm, nn.ReLU(), nn.Linear(9, 2)).double().eval()
        with torch.no_grad():
            model[0].weight[:3] = 0
            model[3].weight[:, 7:] = 0
        small = compact(model, torch.randn(4, 6).double())
        assert small.get_submodule("1").num_features in (4, 7)
        x = torch.randn(5, 6).double()
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_residual_network_in_three_dimensions_of_width():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 16), Residual(16, 32, 2),
        Residual(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    small = check(
        model, torch.randn(1, 3, 16, 16), inputs=(torch.randn(2, 3, 20, 20).double(),), density=0.05
    )
    assert small.report.parameters[1] < small.report.parameters[0] / 2
    assert not small.report.left


def test_a_model_of_one_axis_only():
    check(nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 1)), torch.randn(1, 3, 10))
    check(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(3, 9, 9))  # no batch
    check(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5))
