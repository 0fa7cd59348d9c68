"""GraSP: what the squared norm of the gradient loses with a connection.

L = a^2 b / 2 at a = 2, b = 1 has g = (ab, a^2 / 2) = (2, 2) and H = ((b, a), (a, 0)) = ((1, 2), (2, 0)), so
H g = (6, 4) and w (H g) = (12, 4). The squared norm F = a^2 b^2 + a^4 / 4 has a dF/da = 24 and b dF/db = 8:
twice that.
"""

import pytest
import torch
from torch import nn

from lightning_rigl import RigLCallback, Sparsifier
from lightning_rigl.methods.base import Probe
from lightning_rigl.methods.grasp import GraSP
from lightning_rigl.methods.synflow import SynFlow
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import adamw, run, same, sgd
from tests.methods.pruning import NAMES, TARGETS, loss_of, lowest, training
from tests.model.conftest import GPU
from tests.model.problems import batches, network


def scores(model, loss, names=NAMES):
    parameters = {name: model.get_parameter(name) for name in names}
    return GraSP().look(Probe(model, lambda: loss(model), model, None, parameters, {}))


def gradient_flow(model, loss):
    grads = torch.autograd.grad(loss(model), [model.get_parameter(name) for name in NAMES])
    return float(sum(g.square().sum() for g in grads))


def test_by_hand():
    pair = nn.ParameterDict({"a": torch.tensor([2.0]), "b": torch.tensor([1.0])})
    found = scores(pair, lambda p: (p["a"] ** 2 * p["b"] / 2).sum(), names=("a", "b"))
    assert {name: score.tolist() for name, score in found.items()} == {"a": [12.0], "b": [4.0]}


def test_finite_differences_of_the_gradient_flow():
    """2 w (H g) = w dF / dw = the slope of F in the factor of a connection: what dropping it would cost."""
    model, (batch,) = network(torch.float64), batches(1, torch.float64)
    found, step = scores(model, lambda m: loss_of(m, batch)), 1e-4
    for name in NAMES:
        weight = model.get_parameter(name).data.view(-1)
        for index in range(0, weight.numel(), 7):
            value, flows = weight[index].item(), []
            for factor in (1 + step, 1 - step):
                weight[index] = value * factor
                flows.append(gradient_flow(model, lambda m: loss_of(m, batch)))
            weight[index] = value
            slope = (flows[0] - flows[1]) / (2 * step)
            assert found[name].view(-1)[index].item() == pytest.approx(slope / 2, rel=1e-5, abs=1e-9)


def test_the_whole_hessian():
    """The slow way: all second derivatives, then a matrix product."""
    model, (batch,) = network(torch.float64), batches(1, torch.float64)
    loss = loss_of(model, batch)
    weights = [model.get_parameter(name) for name in NAMES]
    g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = [torch.autograd.grad(each, weights, retain_graph=True) for each in g]
    hessian = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])
    expected = torch.cat([w.reshape(-1) for w in weights]) * (hessian @ g)
    found = scores(model, lambda m: loss_of(m, batch))
    torch.testing.assert_close(torch.cat([found[n].reshape(-1) for n in NAMES]), expected.detach())


def test_the_lowest_of_the_whole_model_are_dropped_in_place_of_the_first_step():
    model, data = network(torch.float64), batches(20, torch.float64)
    found = scores(model, lambda m: loss_of(m, data[0]))
    masks = lowest(found, {n: torch.ones_like(score).bool() for n, score in found.items()}, 352 - 88)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for done, sparsifier in enumerate(training("grasp", 20, model=model)):
        if done == 0:
            assert all(mask.all() for mask in sparsifier.masks.values())
            continue
        assert sum(sparsifier.counts.values()) == sum(TARGETS.values())
        assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())
        if done == 1:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name] * masks[name] if name in masks else before[name])
    assert sparsifier.updates == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.block = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.block(self.drop(x[:, None].expand(-1, 3, -1)))[:, 0, :4]


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.cell = kind(12, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, None].expand(-1, 3, -1))[0][:, -1]


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, (2, 3)))

    def forward(self, x):
        return self.net(x.view(-1, 1, 3, 4)).flatten(1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kind", [Attention, Recurrent, Convolution])
def test_attention_recurrence_and_convolution(kind, device):
    """Fused kernels and cuDNN's recurrence have no second derivative."""
    model, (batch,) = kind().to(device, torch.float64), batches(1, torch.float64, device)
    statistics = [buffer.clone() for buffer in model.buffers()]
    sparsifier, state = Sparsifier(model, 0.5, "grasp"), torch.get_rng_state()
    sparsifier.look(lambda twin: loss_of(twin, batch))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.notes["score"].count_nonzero() for layer in sparsifier.layers.values())
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), statistics, strict=True))
    assert torch.backends.cudnn.enabled


def test_compiled_parts_are_differentiated_as_what_they_were_made_of():
    model, (batch,) = network(torch.float64), batches(1, torch.float64)
    plain = scores(model, lambda m: loss_of(m, batch))
    for compiled in (
        torch.compile(model, backend="aot_eager"),
        nn.Sequential(*model[:2], torch.compile(model[2], backend="aot_eager"), *model[3:]),
    ):
        sparsifier = Sparsifier(compiled, 0.5, "grasp")
        sparsifier.look(lambda twin: loss_of(twin, batch))
        assert {n: layer.notes["score"].tolist() for n, layer in sparsifier.layers.items()} == {
            n: score.tolist() for n, score in plain.items()
        }


def test_a_layer_that_the_loss_does_not_need_is_worth_nothing():
    model, (batch,) = network(torch.float64), batches(1, torch.float64)
    model.add_module("side", nn.Linear(4, 4).double())
    found = scores(model, lambda m: loss_of(nn.Sequential(*list(m)[:5]), batch), (*NAMES, "side.weight"))
    assert not found["side.weight"].any()
    assert found["0.weight"].any()


def test_without_a_first_look_the_first_step_says_so():
    model, (batch,) = network(), batches(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, 0.5, "grasp")
    sparsifier.start(20)
    loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match=r"GraSP .* call sparsifier\.look\(\) before any step"):
        sparsifier.before_step(optimizer, 0)


def test_in_a_trainer():
    """As in a plain loop on the first batch."""
    callback, module = RigLCallback(0.8, "grasp"), small(dtype=torch.float64)
    model, batch = small(dtype=torch.float64), next(iter(data(dtype=torch.float64)))
    sparsifier = Sparsifier(model, 0.8, "grasp")
    sparsifier.look(lambda twin: nn.functional.cross_entropy(twin(batch[0]), batch[1]))
    found = {name: layer.notes["score"] for name, layer in sparsifier.layers.items()}
    masks = lowest(found, {n: torch.ones_like(score).bool() for n, score in found.items()}, 480 - 98)
    trainer(callback, max_epochs=2).fit(module, data(dtype=torch.float64))
    assert all(torch.equal(mask, masks[name]) for name, mask in callback.masks.items())


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("method", [GraSP(), SynFlow()], ids=str)
def test_a_resumed_run_ends_as_the_undisturbed_one(method, optimizer, tmp_path):
    straight = run(tmp_path, RigLCallback(0.8, method), module=small(optimizer=optimizer))
    assert straight["sparsity"]["updates"] == 1
    for step in (1, 2, 8):
        resume, module = tmp_path / f"step={step}.ckpt", small(seed=1, optimizer=optimizer)
        again = run(tmp_path / "again", RigLCallback(0.8, method), module=module, resume=resume)
        assert same(straight, again), step
