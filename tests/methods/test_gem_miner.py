"""Gem-Miner: scores in [0, 1] on frozen weights; the lowest are frozen away, over all layers together.

             layer a               layer b
    index    0    1    2    3      0    1    2    3
    score   .9   .1   .6   .2     .7   .1   .3   .8     target 1 + 1: density 1/4
    weight   1   -2    3   -4      5   -6    7   -8     never trained

Of two freezes each clears half: first a1, b1, a3, b2, then a2, b0. Of the equal scores b1 would go first.
"""

import math

import pytest
import torch
from torch import nn

from lightning_rigl import Connections, RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.methods.base import Moment
from lightning_rigl.methods.gem_miner import GemMiner
from lightning_rigl.topology.overall import freeze
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import read, run, same
from tests.methods.latent_loop import Loop, Twin

A, B = torch.tensor([[0.9, 0.1, 0.6, 0.2]]), torch.tensor([[0.7, 0.1, 0.3, 0.8]])
SCHEDULE = UpdateSchedule(every=10, begin=0, end=45, policy="after_step")  # 0, 10, 20, 30, 40
FAST = {"lr": 20.0, "momentum": 0.9}


def layer(weight, target=1, grad=None, seed=0, mask=None):
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    return Connections(weight, mask, grad, torch.Generator().manual_seed(seed), target)


def example(method):
    """The two layers of the example, as the engine would hold them."""
    layers = [layer(torch.tensor([[1.0, -2, 3, -4]])), layer(torch.tensor([[5.0, -6, 7, -8]]))]
    for own, score in zip(layers, (A, B), strict=True):
        method.begin(own)
        own.notes["variable"] = score.clone()
    return layers


def project(method, layers, due=False, progress=0.0):
    """Active connections, as a0, a1, ..."""
    moment = Moment(0, progress=progress, due=due)
    pairs = method.project(layers, [own.notes["variable"] for own in layers], moment)
    masks = torch.cat([mask for mask, _ in pairs]).view(-1).nonzero().view(-1).tolist()
    return [f"{'ab'[i // 4]}{i % 4}" for i in masks]


def flags(layers):
    return torch.cat([own.notes["flag"] for own in layers]).int().tolist()


class TestWorkedExample:
    def test_a_connection_is_active_above_one_half(self):
        layers = example(GemMiner())
        assert project(GemMiner(), layers) == ["a0", "a2", "b0", "b3"]
        layers[0].notes["variable"][0, 0] = 0.5
        assert project(GemMiner(), layers) == ["a2", "b0", "b3"]

    def test_two_freezes(self):
        layers = example(GemMiner())
        project(GemMiner(), layers, due=True)
        assert flags(layers) == [[1, 1, 1, 1], [1, 1, 1, 1]]
        project(GemMiner(), layers, due=True, progress=0.5)
        assert flags(layers) == [[1, 0, 1, 0], [1, 0, 0, 1]]
        assert project(GemMiner(), layers, due=True, progress=1.0) == ["a0", "b3"]
        assert flags(layers) == [[1, 0, 0, 0], [0, 0, 0, 1]]

    def test_of_equal_scores_the_later_is_frozen_first(self):
        layers = example(GemMiner())
        layers[0] = Connections(**{**vars(layers[0]), "target": 3})
        layers[1] = Connections(**{**vars(layers[1]), "target": 4})
        project(GemMiner(), layers, due=True, progress=1.0)  # 7 of 8 are to stay
        assert flags(layers) == [[1, 1, 1, 1], [1, 0, 1, 1]]

    def test_what_is_frozen_never_returns(self):
        layers = example(GemMiner())
        project(GemMiner(), layers, due=True, progress=0.5)
        layers[0].notes["variable"].fill_(1)
        assert project(GemMiner(), layers) == ["a0", "a2", "b0", "b3"]

    def test_inverted_the_highest_are_frozen(self):
        method = GemMiner(inverted=True)
        layers = example(method)
        project(method, layers, due=True, progress=0.5)
        assert flags(layers) == [[0, 1, 0, 1], [0, 1, 1, 0]]

    @pytest.mark.parametrize(("revive", "left"), [(True, ["a0", "b3"]), (False, ["a0"])])
    def test_the_last_freeze_revives_what_the_penalty_has_rounded_to_zero(self, revive, left):
        method = GemMiner(revive=revive)
        layers = example(method)
        for own in layers:
            own.notes["variable"].mul_(0.6)  # a0 .54, b3 .48
        assert project(method, layers, due=True, progress=0.5) == ["a0"]
        assert project(method, layers, due=True, progress=1.0) == left
        assert project(method, layers) == left  # and in the steps that follow

    def test_scores_are_clipped(self):
        layers = example(GemMiner())
        layers[0].notes["variable"].mul_(4).sub_(1)
        project(GemMiner(), layers)
        expected = torch.tensor([[1, 0, 1, 0]])
        assert torch.equal(layers[0].notes["variable"], expected.float())

    @pytest.mark.parametrize(
        ("norm", "expected"), [("l2", [5.9, -9.9, 0, -19.8]), ("l1", [5.5, -9.5, 0, -19.5])]
    )
    def test_the_gradient_of_a_score(self, norm, expected):
        """g w + 2 x 0.5 x p, or + 0.5 (g = 5 everywhere), none where the flag is cleared."""
        method = GemMiner(penalty=0.5, norm=norm)
        own = layer(torch.tensor([[1.0, -2, 3, -4]]), grad=torch.full((1, 4), 5.0))
        method.begin(own)
        own.notes["flag"][0, 2] = False
        torch.testing.assert_close(method.pull(own, A), torch.tensor([expected]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 100])
@pytest.mark.parametrize(("size", "target"), [(1000, 100), (64, 1), (12345, 617), (10, 9), (8, 8)])
def test_the_density_bound_holds_at_every_freeze_and_the_last_is_exact(size, target, count):
    left, before = size, 0.0
    for now in (j / count for j in range(count + 1)):
        cleared = freeze(left, size, target, before, now)
        share = 1 - math.exp(math.log(target / size) * (now - before))
        assert cleared >= 0
        assert now == 1 or cleared == min(math.ceil(round(share * left, 9)), left - target)
        left, before = left - cleared, now
        assert left <= size * (target / size) ** now + 1e-9 or left == target
    assert left == target


def test_exact_shares_are_not_rounded_up():
    """81 (1 - exp(log(1/81) / 4)) is 54 and a bit in floating numbers."""
    assert [freeze(81, 81, 1, 0.0, 0.25), freeze(27, 81, 1, 0.25, 0.5)] == [54, 18]
    assert freeze(1000, 1000, 1, 0.0, 1 / 3) == 900


def test_the_last_update_clears_all_but_the_target_however_many_are_left():
    assert freeze(500, 1000, 100, 0.9, 1.0) == 400
    assert freeze(100, 1000, 100, 1.0, 1.0) == 0


def test_scores_start_uniform_and_the_weights_are_noted():
    own = layer(torch.randn(100, 200))
    state = torch.random.get_rng_state()
    scores = GemMiner().begin(own)
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0 <= scores.min() < 1e-3
    assert 0.999 < scores.max() < 1
    assert float(scores.std()) == pytest.approx(1 / math.sqrt(12), rel=0.01)
    assert torch.equal(scores, GemMiner().begin(layer(own.weight)))
    assert torch.equal(own.notes["weight"], own.weight)
    assert own.notes["weight"] is not own.weight


def clear_lowest(scores, flags, count):
    """The slow freeze: of all flagged connections the `count` of lowest score, of equal ones the last."""
    ranked = sorted(
        (value, -place, -index, name)
        for place, name in enumerate(scores)
        for index, value in enumerate(scores[name].detach().view(-1).tolist())
        if flags[name].view(-1)[index]
    )
    for _, _, index, name in ranked[:count]:
        flags[name].view(-1)[-index] = False


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("revive", [True, False])
def test_fifty_steps_equal_the_twin(norm, revive):
    penalty = 1e-3
    loop = Loop(GemMiner(penalty, norm, revive), schedule=SCHEDULE, hyper=FAST)
    targets = sum(own.target for own in loop.sparsifier.layers.values())
    flags = {name: torch.ones_like(mask) for name, mask in loop.sparsifier.masks.items()}
    sizes = sum(flag.numel() for flag in flags.values())
    over = []

    def choose(scores):
        return {n: flags[n].clone() if over else flags[n] & (s.detach() > 0.5) for n, s in scores.items()}

    def loss(scores):
        flagged = [scores[name][flag] for name, flag in flags.items()]
        return penalty * sum(p.square().sum() if norm == "l2" else p.abs().sum() for p in flagged)

    twin = Twin(loop, choose, lambda s: s, loss, FAST)
    frozen = []

    def after():
        for score in twin.scores.values():
            score.clamp_(0, 1)
        if loop.step in (10, 20, 30, 40):
            left = sum(int(flag.sum()) for flag in flags.values())
            rate = 1 - math.exp(math.log(targets / sizes) / 4)
            clear_lowest(twin.scores, flags, left - targets if loop.step == 40 else math.ceil(rate * left))
            frozen.append(sum(int(flag.sum()) for flag in flags.values()))
        if loop.step == 40 and revive:
            over.append(True)

    def compare(loop):
        twin.train(*loop.data[loop.step], after)
        for name, mask in loop.sparsifier.masks.items():
            assert torch.equal(mask, twin.masks[name])
            scores = loop.sparsifier.layers[name].notes["variable"]
            flag = flags[name]  # the scores of frozen connections have no meaning
            torch.testing.assert_close(scores[flag], twin.scores[name].detach()[flag], rtol=0, atol=1e-10)
        for name, bias in twin.biases.items():
            torch.testing.assert_close(loop.model.get_parameter(name), bias, rtol=0, atol=1e-10)

    loop.go(55, compare)
    assert frozen == sorted(frozen, reverse=True)
    assert frozen[-1] == targets
    assert (sum(loop.sparsifier.counts.values()) == targets) is revive


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_invariants_of_a_search(dtype):
    """Weights bitwise, scores in [0, 1], masks inside the flags, the density bound at each freeze."""
    loop = Loop(GemMiner(), schedule=SCHEDULE, dtype=dtype, hyper=FAST)
    own = loop.sparsifier.layers
    size, target = sum(x.mask.numel() for x in own.values()), sum(x.target for x in own.values())
    lefts = []

    def look(loop):
        for name, mask in loop.sparsifier.masks.items():
            notes = own[name].notes
            weight = loop.sparsifier.parameters[name].detach()
            assert torch.equal(weight, torch.where(mask, loop.initial[name], 0))
            assert notes["variable"].min() >= 0
            assert notes["variable"].max() <= 1
            assert not (mask & ~notes["flag"]).any()
        lefts.append(sum(int(flag.sum()) for flag in loop.notes("flag").values()))
        progress = loop.step // 10 / 4
        assert lefts[-1] <= size * (target / size) ** min(progress, 1) + 1e-9

    loop.go(60, look)
    changes = [step for step in range(1, 60) if lefts[step] != lefts[step - 1]]
    assert changes == [10, 20, 30, 40]
    assert lefts[-1] == target == sum(loop.sparsifier.counts.values())
    assert loop.sparsifier.updates == 5


def test_a_penalty_alone_makes_the_network_sparse():
    counts = {}
    for penalty in (0.0, 3e-3, 3e-2):
        loop = Loop(
            GemMiner(penalty), hyper=FAST, schedule=UpdateSchedule(10, begin=58, policy="after_step", end=60)
        )
        counts[penalty] = sum(loop.go(55).sparsifier.counts.values())
    assert counts[0.0] > counts[3e-3] > counts[3e-2]


def test_given_masks_are_where_the_search_begins_and_stay_its_limit():
    masks = dict(Sparsifier(Loop(GemMiner(), schedule=SCHEDULE).model, 0.8, "static", seed=3).masks)
    given = {name: mask.clone() for name, mask in masks.items()}
    loop = Loop(GemMiner(), schedule=SCHEDULE, init=given, hyper=FAST)
    assert all(torch.equal(mask, given[name]) for name, mask in loop.sparsifier.masks.items())
    loop.go(60)
    assert all(not (mask & ~given[name]).any() for name, mask in loop.sparsifier.masks.items())


@pytest.mark.parametrize("at", [15, 20, 21, 41])
def test_a_resumed_search_ends_bitwise_as_the_straight_one(at):
    straight = Loop(GemMiner(), schedule=SCHEDULE, hyper=FAST).go(at)
    state = straight.state()
    straight.go(55)
    resumed = Loop(GemMiner(), schedule=SCHEDULE, hyper=FAST).load(state)
    resumed.step = at
    resumed.go(55)
    assert same(straight.state()[:2], resumed.state()[:2])
    assert same(straight.state()[2]["notes"], resumed.state()[2]["notes"])


def test_a_resumed_search_has_the_weights_of_a_layer_that_is_full():
    schedule = UpdateSchedule(
        every=1, begin=0, end=1, policy="after_step"
    )  # all are frozen, or safe, at once
    straight = Loop(GemMiner(), sparsity=0.0, schedule=schedule).go(5)
    resumed = Loop(GemMiner(), sparsity=0.0, schedule=schedule).load(straight.state())
    assert same(straight.state()[0], resumed.state()[0])


@pytest.mark.parametrize("step", [3, 6, 7, 11])
def test_a_resumed_fit_ends_bitwise_as_the_straight_one(step, tmp_path):
    def sparse():
        schedule = UpdateSchedule(every=3, begin=0, end=12, policy="after_step")
        return RigLCallback(0.8, GemMiner(), schedule=schedule, seed=4)

    def fit(folder, resume=None, seed=0):
        module = small(seed=seed, optimizer=lambda p: torch.optim.SGD(p, 5.0, momentum=0.9))
        return run(folder, sparse(), module=module, resume=resume)

    straight = fit(tmp_path)
    assert same(straight, fit(tmp_path / "again", tmp_path / f"step={step}.ckpt", seed=1))


@pytest.mark.parametrize("init", ["nonzero", "masks"])
def test_the_ticket_is_fine_tuned_from_its_initial_weights(init, tmp_path):
    """The recipe: a search, then a second fit of the same module with the mask fixed."""
    module = small(optimizer=lambda p: torch.optim.SGD(p, 5.0, momentum=0.9))
    first = {n: p.detach().clone() for n, p in module.named_parameters()}
    schedule = UpdateSchedule(every=8, begin=0, end=1.0, policy="after_step")
    search = RigLCallback(0.6, GemMiner(), schedule=schedule, seed=1)
    loop = trainer(search, max_epochs=10)
    loop.fit(module, data())
    ticket = {name: mask.clone() for name, mask in search.masks.items()}
    assert sum(int(m.sum()) for m in ticket.values()) == sum(
        x.target for x in search.sparsifier.layers.values()
    )
    for name, mask in ticket.items():
        assert torch.equal(module.get_parameter(name), torch.where(mask, first[name], 0))

    if init == "masks":
        torch.save(ticket, tmp_path / "ticket.pt")
        module.load_state_dict(first)  # the biases too start anew
    module.make = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    tune = RigLCallback(method="static", init=init if init == "nonzero" else str(tmp_path / "ticket.pt"))
    second = trainer(tune, max_epochs=5)
    second.fit(module, data())
    for name, mask in ticket.items():
        assert torch.equal(tune.masks[name], mask)
        assert not torch.equal(module.get_parameter(name), torch.where(mask, first[name], 0))
        assert (module.get_parameter(name)[~mask] == 0).all()
    assert second.callback_metrics["loss"] < loop.callback_metrics["loss"]


def test_a_checkpoint_holds_the_ticket_as_plain_weights(tmp_path):
    module = small()
    search = RigLCallback(0.6, GemMiner(), schedule=UpdateSchedule(8, begin=0, end=1.0, policy="after_step"))
    loop = trainer(search)
    loop.fit(module, data())
    loop.save_checkpoint(tmp_path / "end.ckpt")
    saved = read(tmp_path / "end.ckpt")
    weights = search.sparsifier.layers["net.0.weight"].notes["weight"]
    assert saved["state_dict"].keys() == small().state_dict().keys()
    assert torch.equal(saved["state_dict"]["net.0.weight"], weights * search.masks["net.0.weight"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="penalty: a number of at least 0, got -1"):
        GemMiner(penalty=-1)
    with pytest.raises(ValueError, match="penalty: a number of at least 0, got inf"):
        GemMiner(penalty=math.inf)
    with pytest.raises(ValueError, match="unknown name 'l3'; the known ones are l2, l1"):
        GemMiner(norm="l3")
    with pytest.raises(TypeError, match="gemminer, penalty: a number, got 'a'"):
        GemMiner(penalty="a")
    for name in ("revive", "inverted"):
        with pytest.raises(TypeError, match=f"gemminer, {name}: True or False, got 'no'"):
            GemMiner(**{name: "no"})


def test_its_updates_follow_a_step_whatever_the_policy():
    first, second = (
        Loop(GemMiner(), schedule=UpdateSchedule(every=10, begin=0, end=45, policy=policy), hyper=FAST).go(50)
        for policy in ("skip_step", "after_step")
    )
    assert same(first.state()[:2], second.state()[:2])
    assert first.sparsifier.updates == 5


def test_a_state_that_is_saved_inside_a_step_is_resumed_before_it():
    """An exception may come between the hooks before a step and the step: then the parameter holds scores."""
    straight, stopped = (Loop(GemMiner(), schedule=SCHEDULE, hyper=FAST).go(15) for _ in range(2))
    nn.functional.mse_loss(stopped.model(stopped.data[15][0]), stopped.data[15][1]).backward()
    stopped.sparsifier.before_step(stopped.optimizer, 15)
    resumed = Loop(GemMiner(), schedule=SCHEDULE, hyper=FAST).load(stopped.state())
    resumed.step = 15
    assert same(straight.go(55).state()[:2], resumed.go(55).state()[:2])
