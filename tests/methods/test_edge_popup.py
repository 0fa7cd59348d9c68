"""Edge-popup: frozen weights, trained scores, and the connections of largest |score|.

    index     0     1     2     3     4     5
    weight    3     2    -1    -2     1     4     never trained
    score    .1   -.6    .2   -.3    .5    .2     |s| ranks 1, 4, 3, 2 (before 5: a tie), 5, 0
    gradient  1     1     1     1     1     1     of the weights

Three connections: 1, 4, 3. The gradient of the scores is w sign(s): 3, -2, -1, 2, 1, 4.
"""

import math

import pytest
import torch

from lightning_rigl import Connections, RigLCallback, Sparsifier
from lightning_rigl.methods.base import Moment
from lightning_rigl.methods.edge_popup import EdgePopup, GlobalEdgePopup
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import same
from tests.methods.latent_loop import Loop, Twin, highest

WEIGHT = torch.tensor([[3.0, 2, -1, -2, 1, 4]])
SCORE = torch.tensor([[0.1, -0.6, 0.2, -0.3, 0.5, 0.2]])
METHODS = [EdgePopup(), GlobalEdgePopup()]


def layer(weight=WEIGHT, target=3, grad=None, seed=0, mask=None):
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    return Connections(weight, mask, grad, torch.Generator().manual_seed(seed), target)


@pytest.mark.parametrize(("target", "active"), [(1, [1]), (3, [1, 3, 4]), (4, [1, 2, 3, 4]), (6, range(6))])
def test_the_worked_example(target, active):
    own = layer(target=target)
    EdgePopup().begin(own)
    [(mask, weight)] = EdgePopup().project([own], [SCORE], Moment(0))
    assert mask.view(-1).nonzero().view(-1).tolist() == list(active)
    assert torch.equal(weight, WEIGHT)


def test_the_gradient_goes_straight_through_the_choice_and_by_the_sign_through_the_absolute_value():
    own = layer(grad=torch.ones(1, 6))
    EdgePopup().begin(own)
    assert EdgePopup().pull(own, SCORE).tolist() == [[3, -2, -1, 2, 1, 4]]


def test_the_global_ranking_shares_the_sum_of_the_targets():
    layers = [layer(target=1), layer(target=2)]
    for own in layers:
        GlobalEdgePopup().begin(own)
    pairs = GlobalEdgePopup().project(layers, [SCORE, SCORE / 10], Moment(0))
    assert [mask.view(-1).nonzero().view(-1).tolist() for mask, _ in pairs] == [[1, 3, 4], []]
    pairs = GlobalEdgePopup().project(layers, [SCORE, SCORE], Moment(0))
    assert [mask.view(-1).nonzero().view(-1).tolist() for mask, _ in pairs] == [[1, 4], [1]]


def test_scores_start_uniform_within_one_over_the_root_of_the_fan_in():
    own = layer(torch.zeros(50, 40, 5, 5))
    state = torch.random.get_rng_state()
    scores = EdgePopup().begin(own)
    assert torch.equal(state, torch.random.get_rng_state())
    bound = 1 / math.sqrt(1000)
    assert 0.999 * bound < scores.abs().max() <= bound
    assert abs(float(scores.mean())) < 0.01 * bound
    assert float(scores.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(scores, EdgePopup().begin(layer(own.weight)))
    assert not torch.equal(scores, EdgePopup().begin(layer(own.weight, seed=1)))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_fifty_steps_equal_the_twin(method):
    loop = Loop(method)
    targets = {name: own.target for name, own in loop.sparsifier.layers.items()}
    groups = [([name], count) for name, count in targets.items()]
    if isinstance(method, GlobalEdgePopup):
        groups = [(list(targets), sum(targets.values()))]

    def choose(scores):
        return highest({name: s.abs() for name, s in scores.items()}, groups)

    twin, first = Twin(loop, choose, torch.abs), {n: m.clone() for n, m in loop.sparsifier.masks.items()}
    assert all(torch.equal(mask, twin.masks[name]) for name, mask in first.items())

    def compare(loop):
        twin.train(*loop.data[loop.step])
        for name, mask in loop.sparsifier.masks.items():
            assert torch.equal(mask, twin.masks[name])
            scores = loop.sparsifier.layers[name].notes["variable"]
            torch.testing.assert_close(scores, twin.scores[name].detach(), rtol=0, atol=1e-12)
        for name, bias in twin.biases.items():
            torch.testing.assert_close(loop.model.get_parameter(name), bias, rtol=0, atol=1e-12)

    loop.go(50, compare)
    assert any(not torch.equal(mask, first[name]) for name, mask in loop.sparsifier.masks.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_weights_never_change_and_counts_neither(method, dtype):
    loop = Loop(method, dtype=dtype)
    targets = {name: own.target for name, own in loop.sparsifier.layers.items()}

    def look(loop):
        for name, mask in loop.sparsifier.masks.items():
            weight = loop.sparsifier.parameters[name].detach()
            assert torch.equal(weight, torch.where(mask, loop.initial[name], 0))
        counts = loop.sparsifier.counts
        assert sum(counts.values()) == sum(targets.values())
        assert isinstance(method, GlobalEdgePopup) or counts == targets

    look(loop)
    loop.go(30, look)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_given_masks_stay(method):
    masks = dict(Sparsifier(Loop(method).model, 0.8, "static", seed=3).masks)
    loop = Loop(method, init=masks)
    loop.go(20)
    assert all(torch.equal(mask, masks[name]) for name, mask in loop.sparsifier.masks.items())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_resumed_run_ends_bitwise_as_the_straight_one(method):
    straight = Loop(method).go(25)
    state = straight.state()
    straight.go(50)
    resumed = Loop(method).load(state)
    resumed.step = 25
    resumed.go(50)
    assert same(straight.state()[:2], resumed.state()[:2])
    assert same(straight.state()[2]["notes"], resumed.state()[2]["notes"])


@pytest.mark.parametrize("method", ["edgepopup", "globaledgepopup"])
def test_a_trainer_searches_and_its_checkpoints_hold_the_subnetwork(method, tmp_path):
    module, rigl = small(), RigLCallback(0.6, method, seed=1)
    weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.ndim > 1}
    loop = trainer(rigl, max_epochs=10)
    loop.fit(module, data())
    loop.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    for name, mask in rigl.masks.items():
        assert torch.equal(saved[name], torch.where(mask, weights[name], 0))
        assert not torch.equal(mask, torch.ones_like(mask))
    assert loop.callback_metrics["loss"] < 1.2  # of four classes, log 4 = 1.39 at first
