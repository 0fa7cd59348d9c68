"""SynFlow: positive weights, an input of ones, and many rounds.

round 1   W1 = ((3, 1), (1, 1))   W2 = (1, 1/2)   hidden (4, 2)   R = 5
          scores ((3, 1), (1/2, 1/2)) and (4, 1): five of six stay, the last of the equal ones goes
round 2   hidden (4, 1): scores ((3, 1), (1/2, -)) and (4, 1/2): four stay, the later of the equal ones goes
round 3   nothing leaves the second neuron: scores ((3, 1), (0, -)) and (4, -): three stay
"""

import copy
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_rigl import RigLCallback, Sparsifier
from lightning_rigl.methods.base import Probe
from lightning_rigl.methods.synflow import SynFlow, _flow, _make_linear
from tests.callbacks.problems import Small, data, small, trainer


def mlp(*widths, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = [m for pair in pairwise(widths) for m in (nn.Linear(*pair, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def probe(model, target, example=None):
    """A copy, and the total that stays; how it is shared between the layers has no say."""
    twin = copy.deepcopy(model)
    weights = {name: p for name, p in twin.named_parameters() if p.dim() > 1}
    example = torch.randn(5, next(iter(weights.values())).shape[1]) if example is None else example
    targets = {name: target if not place else 0 for place, name in enumerate(weights)}
    return Probe(twin, lambda: None, twin, example, weights, targets)


def kept(model, target, method=None, example=None):
    method = method or SynFlow()
    found = method.look(probe(model, target, example))
    return {name: score == method.rounds for name, score in found.items()}


def twin_mlp(weights, target, rounds):
    """The paper's iteration in numpy: R = 1'|W_L| ... |W_1| 1, and the products of both sides."""
    weights = [np.abs(w) for w in weights]
    masks, size = [np.ones(w.shape, bool) for w in weights], sum(w.size for w in weights)
    for k in range(1, rounds + 1):
        before, after = [np.ones(weights[0].shape[1])], [np.ones(weights[-1].shape[0])]
        for w, m in zip(weights, masks, strict=True):
            before.append((w * m) @ before[-1])
        for w, m in zip(weights[::-1], masks[::-1], strict=True):
            after.append(after[-1] @ (w * m))
        scores = [
            w * m * np.outer(after[len(weights) - 1 - i], before[i])
            for i, (w, m) in enumerate(zip(weights, masks, strict=True))
        ]
        for score, m in zip(scores, masks, strict=True):
            score[~m] = -1
        flat = np.concatenate([score.ravel() for score in scores])
        count = round(size * (target / size) ** (k / rounds))
        left = np.zeros(size, bool)
        left[np.argsort(-flat, kind="stable")[:count]] = True
        masks = [
            part.reshape(w.shape)
            for part, w in zip(
                np.split(left, np.cumsum([w.size for w in weights])[:-1]), weights, strict=True
            )
        ]
    return masks


def test_by_hand():
    net = mlp(2, 2, 1, bias=False)
    net[0].weight.data = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    net[2].weight.data = torch.tensor([[1.0, -0.5]])
    lasted = SynFlow(rounds=3).look(probe(net, 3))
    assert {name: score.tolist() for name, score in lasted.items()} == {
        "0.weight": [[3, 3], [2, 0]],
        "2.weight": [[3, 1]],
    }


def test_what_is_dropped_does_not_come_back():
    """5, 5, 4 and 4 stay. In the last round the second neuron leads nowhere: its own connection, and the one
    that was dropped first, both score zero, and that one has the lower index."""
    net = mlp(2, 2, 1, bias=False)
    net[0].weight.data, net[2].weight.data = torch.tensor([[3, 1], [0.4, 0.5]]), torch.tensor([[1, 0.5]])
    lasted = SynFlow(rounds=4).look(probe(net, 4))
    assert [score.tolist() for score in lasted.values()] == [[[4, 4], [0, 4]], [[4, 2]]]


@pytest.mark.parametrize("target", [1000, 150, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_is_that_of_the_paper_s_iteration(bias, target):
    model = mlp(20, 40, 30, 5, bias=bias)
    weights = [m.weight.detach().double().numpy() for m in model[::2]]
    for mask, expected in zip(kept(model, target).values(), twin_mlp(weights, target, 100), strict=True):
        assert mask.tolist() == expected.tolist()


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.drop = nn.Conv2d(8, 6, 3, stride=2), nn.Dropout(0.5)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        return self.last(self.drop(functional.relu(self.second(x)).mean((2, 3))))


@pytest.mark.parametrize("target", [300, 60])
def test_a_cnn_is_that_of_the_paper_s_iteration(target):
    """Without norm, dropout and activations, which change nothing for positive numbers in evaluation mode."""
    model, image = CNN(), torch.randn(2, 3, 9, 9)
    nn.init.normal_(model.norm.running_mean)  # as if it had been trained
    with torch.no_grad():
        model.norm.running_var.mul_(7)
    first, second, last = (
        p.detach().double().abs() for p in (model.first.weight, model.second.weight, model.last.weight)
    )
    masks = [torch.ones_like(w) for w in (first, second, last)]
    size = first.numel() + second.numel() + last.numel()
    for k in range(1, 101):
        own = [(w * m).requires_grad_() for w, m in zip((first, second, last), masks, strict=True)]
        x = functional.conv2d(torch.ones(1, 3, 9, 9, dtype=torch.float64), own[0], padding=1)
        functional.linear(functional.conv2d(x, own[1], stride=2).mean((2, 3)), own[2]).sum().backward()
        flat = torch.cat(
            [(w * w.grad).detach().where(m > 0, -1).view(-1) for w, m in zip(own, masks, strict=True)]
        )
        order = flat.argsort(descending=True, stable=True)
        left = torch.zeros(size, dtype=torch.float64)
        left[order[: round(size * (target / size) ** (k / 100))]] = 1
        parts = left.split([m.numel() for m in masks])
        masks = [part.view(m.shape) for part, m in zip(parts, masks, strict=True)]
    for mask, expected in zip(kept(model, target, example=image).values(), masks, strict=True):
        assert torch.equal(mask, expected.bool())
    assert sum(int(m.sum()) for m in masks) == target


def test_the_scores_of_a_layer_add_up_to_those_of_any_other_and_so_do_those_into_and_out_of_a_neuron():
    """The conservation laws: theorems 1 and 2."""
    seen = probe(mlp(20, 40, 30, 5), 1)
    _make_linear(seen.model)
    ones, weights = torch.ones(1, 20, dtype=torch.float64), list(seen.parameters.values())
    flow = _flow(seen, ones, weights, first=True)
    layers = [p.view(w.shape) for p, w in zip(flow.split([w.numel() for w in weights]), weights, strict=True)]
    for scores in layers:
        assert scores.sum().item() == pytest.approx(seen.model(ones).sum().item(), rel=1e-12)
    for into, out in pairwise(layers):
        torch.testing.assert_close(into.sum(1), out.sum(0))


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_is_emptied_where_one_round_empties_some(seed):
    model = mlp(50, 100, 20, 200, 10, seed=seed)
    rounds, once = kept(model, 60), kept(model, 60, SynFlow(rounds=1))
    assert sum(int(mask.sum()) for mask in rounds.values()) == 60
    assert all(mask.any() for mask in rounds.values())
    assert not all(mask.any() for mask in once.values())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scores_that_float32_does_not_know(scale):
    """Thirty layers of small weights, or of large ones: R is 0 there, or infinite."""
    model, plain = mlp(*[8] * 30), mlp(*[8] * 30)
    for parameter in model.parameters():
        parameter.data *= scale
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.abs_().mul_("bias" not in name)
        assert twin(torch.ones(1, 8)).sum().item() in (0.0, float("inf"))
    masks, others = kept(model, 300), kept(plain, 300)
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    assert all(mask.any() for mask in masks.values())


def test_ties_do_not_change_a_count():
    """``score <= threshold`` removes all equal scores."""
    model = mlp(6, 6, 6)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    for target in range(2, 72, 7):
        assert sum(int(mask.sum()) for mask in kept(model, target).values()) == target


def test_norms_pass_on_what_they_get():
    plain, normed = mlp(12, 16, 4), mlp(12, 16, 4)
    for norm in (nn.LayerNorm(16), nn.GroupNorm(4, 16), nn.BatchNorm1d(16)):
        masks = kept(nn.Sequential(normed[0], norm, *normed[1:]), 60)
        assert [m.tolist() for m in masks.values()] == [m.tolist() for m in kept(plain, 60).values()]


class TestRefusals:
    @pytest.mark.parametrize("rounds", [0, -1, 2.0, True, None])
    def test_rounds(self, rounds):
        with pytest.raises(ValueError, match=r"rounds: a whole number of at least 1"):
            SynFlow(rounds)

    def test_a_batch_without_floats(self):
        seen = probe(mlp(4, 4), 4)
        with pytest.raises(ValueError, match="no floating tensor"):
            SynFlow().look(Probe(seen.model, seen.loss, seen.forward, None, seen.parameters, seen.targets))

    @pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
    def test_a_softmax(self, end):
        with pytest.raises(ValueError, match="no softmax may follow"):
            kept(nn.Sequential(*mlp(20, 40, 5), end), 100)

    def test_a_saturated_activation(self):
        with pytest.raises(ValueError, match="must pass on what they get"):
            kept(nn.Sequential(nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh()), 100)

    def test_what_is_beyond_float64(self):
        model = mlp(*[8] * 40)
        for parameter in model.parameters():
            parameter.data *= 1e9
        with pytest.raises(ValueError, match="add up to inf"):
            kept(model, 300)

    def test_several_outputs(self):
        class Two(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        with pytest.raises(ValueError, match="forward gives tuple"):
            kept(Two(4, 4), 4)

    @pytest.mark.parametrize("plain", [True, False])
    @pytest.mark.parametrize(
        ("kind", "why"),
        [("none", "NotImplementedError"), ("two", "TypeError: .*lengths"), ("float32", "RuntimeError: ")],
    )
    def test_a_forward_that_is_not_there_or_takes_something_else(self, kind, why, plain):
        class Module(Small):
            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def two(self, x, lengths):
            return self.net(x)

        forward = {
            "none": pl.LightningModule.forward,
            "two": two,
            "float32": lambda self, x: self.net(x.float()),
        }
        Module.forward = forward[kind]
        module = Module()
        before = copy.deepcopy(module.state_dict())
        message = (
            rf"SynFlow feeds forward one float64 tensor of ones of shape \(1, 16\).*{why}.*"
            "give the model a forward of one tensor, or take snip or grasp"
        )
        look = Sparsifier(module, 0.8, SynFlow()).look
        fit = trainer(RigLCallback(0.8, SynFlow()), max_epochs=1).fit
        with pytest.raises(ValueError, match=message):
            _ = look(lambda twin: 1 / 0, torch.randn(3, 16)) if plain else fit(module, data())
        assert all(torch.equal(values, before[name]) for name, values in module.state_dict().items())


def test_in_a_trainer_and_in_a_plain_loop():
    callback, module = RigLCallback(0.8, SynFlow()), small()
    sparsifier = Sparsifier(small(), 0.8, SynFlow())
    sparsifier.look(lambda twin: 1 / 0, torch.randn(3, 16))  # no loss is asked for
    trainer(callback, max_epochs=1).fit(module, data())
    assert sum(callback.sparsifier.counts.values()) == 98
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.notes["score"] == 100, callback.masks[name])


def test_the_loss_and_the_data_have_no_say():
    masks = []
    for seed in range(2):
        torch.manual_seed(seed)
        sparsifier = Sparsifier(mlp(20, 40, 5), 0.8, SynFlow())
        sparsifier.look(lambda twin: 1 / 0, torch.randn(3, 20))
        masks.append([layer.notes["score"] for layer in sparsifier.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
