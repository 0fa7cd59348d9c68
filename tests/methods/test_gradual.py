"""Gradual magnitude pruning: the cubic curve, to the very connection, and its end.

A layer of 1,000 connections that is to keep 100 has 900 to lose; at progress p it has lost
floor(900 (1 - (1 - p)^3)) of them: 0, 243.9, 787.5, 899.1 and 900 at p = 0, 0.1, 0.5, 0.9 and 1.
"""

import warnings

import pytest
import torch
from torch import nn

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.methods.base import Connections, Moment
from lightning_rigl.methods.gradual import Gradual, GradualGlobal, remaining
from lightning_rigl.topology.schedules import Timetable
from tests.callbacks.flops_problems import F_D, Counts, Silent
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import adamw, run, same, sgd
from tests.methods.pruning import NAMES, TARGETS, last, loss_of, lowest, momentum, snapshot, training
from tests.model.problems import batches, network

METHODS = [Gradual(), GradualGlobal()]
SCHEDULE = UpdateSchedule(every=3, drop_fraction=0.0, begin=4, end=18, policy="after_step")  # 4, 7, ... 16


def layer(weight, target, mask=None):
    weight = torch.as_tensor(weight)
    mask = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
    return Connections(weight, mask, None, torch.Generator(), target)


def test_the_curve_by_hand():
    lost = [1000 - remaining(1000, 100, p) for p in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert lost == [0, 243, 787, 899, 900]


def test_the_first_update_drops_nothing_and_the_last_what_is_left():
    ten = layer(torch.arange(10.0), target=2)
    assert Gradual().turnover([ten], Moment(0, progress=0.0)) == [(0, 0)]
    assert Gradual().turnover([ten], Moment(0, progress=0.5)) == [(7, 0)]  # floor(8 * 7 / 8)
    assert Gradual().turnover([ten], Moment(0, progress=1.0)) == [(8, 0)]


def test_one_ranking_of_two_layers_by_hand():
    """|w| of the first: 5 4 3 2, of the second: 4 1; two stay, and of the equal ones that of the first."""
    first, second = layer([5.0, -4.0, 3.0, 2.0], target=1), layer([4.0, 1.0], target=1)
    assert GradualGlobal().turnover([first, second], Moment(0)) == [(2, 0), (2, 0)]


def test_a_layer_that_is_sparser_already_drops_nothing():
    mask = torch.tensor([True, False, False, False])
    assert Gradual().turnover([layer(torch.ones(4), 2, mask)], Moment(0, progress=0.1)) == [(0, 0)]
    assert GradualGlobal().turnover([layer(torch.ones(4), 2, mask)], Moment(0, progress=0.1)) == [(0, 0)]


@pytest.mark.parametrize("every", [1, 3, 7, 10, 100])
@pytest.mark.parametrize("length", [100, 101, 128, 1000, 32000])
def test_the_last_update_of_any_schedule_reaches_the_target(length, every):
    """A cubic schedule that tells progress by its end, which no update meets, stops at 0.898 for 0.9."""
    times = UpdateSchedule(every=every, begin=10 / 32, end=25 / 32).resolve(length)
    due = [t for t in range(length) if times.due(t, last=t - 1)]
    left = [remaining(1000, 100, times.progress(t)) for t in due]
    assert left[-1] == 100
    assert left == sorted(left, reverse=True)
    assert len(due) == 1 or (left[0] == 1000 and 100 not in left[:-1])


def test_the_own_schedule_has_the_proportions_of_the_paper_and_fits_short_runs():
    times = Gradual().schedule.resolve(32000)
    assert times == Timetable(10, 0.0, "cosine", 10000, 25000, "after_step")
    assert [t for t in range(100) if Gradual().schedule.resolve(100).due(t, t - 1)] == [31, 41, 51, 61, 71]
    for method in METHODS:
        assert sum(last(training(method, 100)).counts.values()) == sum(TARGETS.values())


def twin(method, steps):
    """Written like the paper: train, then keep the largest."""
    model = network(torch.float64)
    weights = {name: model.get_parameter(name) for name in NAMES}
    masks = {name: torch.ones_like(w).bool() for name, w in weights.items()}
    optimizer = momentum(model.parameters())
    yield weights, masks
    for step, batch in enumerate(batches(steps, torch.float64)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for name, weight in weights.items():
            weight.grad[~masks[name]] = 0
        optimizer.step()
        if step in (4, 7, 10, 13, 16):
            p = (step - 4) / 12
            scores = {name: w.detach().abs() for name, w in weights.items()}
            pools = [list(NAMES)] if method == GradualGlobal() else [[name] for name in NAMES]
            for pool in pools:
                size, target = sum(scores[n].numel() for n in pool), sum(TARGETS[n] for n in pool)
                zeros = int((size - target) * (1 - (1 - p) ** 3))
                count = zeros - sum(int((~masks[n]).sum()) for n in pool)
                masks |= lowest({n: scores[n] for n in pool}, masks, count)
            for name, weight in weights.items():
                weight.data[~masks[name]] = 0
                optimizer.state[weight]["momentum_buffer"][~masks[name]] = 0
        yield weights, masks


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_step_is_that_of_a_slow_twin(method):
    for ours, (weights, masks) in zip(training(method, 20, SCHEDULE), twin(method, 20), strict=True):
        for name in NAMES:
            assert torch.equal(ours.masks[name], masks[name])
            assert torch.equal(ours.parameters[name], weights[name])
    assert ours.updates == 5
    assert sum(ours.counts.values()) == 88


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("policy", ["skip_step", "after_step"])
def test_nothing_grows_and_the_counts_are_exact(method, policy):
    schedule = UpdateSchedule(every=2, begin=3, end=20, policy=policy)  # 3, 5 .. 19
    before = None
    for done, sparsifier in enumerate(training(method, 24, schedule)):
        p = min(max((done - 1 - 3) // 2, 0) / 8, 1)
        sizes = {name: mask.numel() for name, mask in sparsifier.masks.items()}
        if method == Gradual():
            assert sparsifier.counts == {n: remaining(sizes[n], TARGETS[n], p) for n in NAMES}
        else:
            assert sum(sparsifier.counts.values()) == remaining(352, 88, p)
        if before is not None:
            assert all((mask <= before[name]).all() for name, mask in sparsifier.masks.items())
        before = snapshot(sparsifier)
        assert all((sparsifier.parameters[name][~before[name]] == 0).all() for name in NAMES)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_ties_do_not_change_a_count(method):
    """A threshold drops all equal weights, or none of them."""
    model = network(torch.float64)
    for name in NAMES:
        nn.init.constant_(model.get_parameter(name), 0.5)
    still = training(method, 20, SCHEDULE, model=model, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    for done, sparsifier in enumerate(still):
        expected = remaining(352, 88, min(max((done - 1 - 4) // 3, 0) / 4, 1))
        assert abs(sum(sparsifier.counts.values()) - expected) < (3 if method == Gradual() else 1)
    if method == Gradual():
        assert sparsifier.counts == TARGETS
        for name, mask in sparsifier.masks.items():  # the lower index stays
            assert mask.view(-1)[: TARGETS[name]].all()
    else:
        assert sparsifier.counts == {"0.weight": 88, "2.weight": 0, "4.weight": 0}  # so does the first layer


def gradual(method="gradual", **settings):
    schedule = UpdateSchedule(every=2, begin=0.3, end=0.8, policy="after_step", **settings)
    return RigLCallback(0.8, method, schedule=schedule, seed=4)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["gradual", "gradualglobal"])
def test_flops_of_a_training_are_the_sum_over_its_real_counts(method, accumulate, order):
    sparse, counter = gradual(method), FLOPsCallback()
    counts = Counts(sparse)
    loop = trainer(*[sparse, counter][::order], counts, max_epochs=3, accumulate_grad_batches=accumulate)
    loop.fit(Silent(), data())
    costs = [f_s for _, f_s in counts.batches]
    assert costs[0] == F_D
    assert costs[-1] < F_D / 4
    assert len(set(costs)) == (6 if accumulate == 1 else 3)  # 7, 9 .. 17 of 24, the first drops nothing
    assert counter.report().train == 3 * 8 * sum(costs)
    assert sparse.sparsifier.counts == {"net.0.weight": 58, "net.2.weight": 40} or method != "gradual"
    assert sum(sparse.sparsifier.counts.values()) == 98


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("method", ["gradual", "gradualglobal"])
def test_a_resumed_run_ends_as_the_undisturbed_one(method, optimizer, tmp_path):
    straight = run(tmp_path, gradual(method), module=small(optimizer=optimizer))
    assert straight["sparsity"]["updates"] == 4  # 4, 6, 8, 10 of 14
    for step in (4, 5, 9):
        again = run(
            tmp_path / "again",
            gradual(method),
            module=small(seed=1, optimizer=optimizer),
            resume=tmp_path / f"step={step}.ckpt",
        )
        assert same(straight, again), step


def test_the_own_schedule_in_a_trainer():
    callback = RigLCallback(0.9, "gradual")
    trainer(callback, max_epochs=5).fit(small(), data())  # 40 steps: 12, 22
    assert callback.sparsifier.updates == 2
    assert callback.sparsifier.counts == {"net.0.weight": 29, "net.2.weight": 21}


ONE = "at once, at step {}: its only update every {} steps before step {}; lower every"


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ("gradual", 12, "RigLCallback: Gradual prunes from dense to its target " + ONE.format(3, 10, 9)),
        ("gradualglobal", 12, "GradualGlobal prunes from dense to its target " + ONE.format(3, 10, 9)),
        ("gemminer", 100, "GemMiner prunes from dense to its target " + ONE.format(0, 100, 100)),
        ("gemminer", 20, "GemMiner prunes from dense to its target " + ONE.format(0, 100, 20)),
    ],
)
def test_a_training_too_short_for_a_second_update_is_warned_of(method, steps, message):
    with pytest.warns(UserWarning, match=message):
        trainer(rigl := RigLCallback(0.9, method, seed=0), max_steps=steps, max_epochs=-1).fit(
            small(), data()
        )
    assert rigl.sparsifier.updates == 1
    target = sum(layer.target for layer in rigl.sparsifier.layers.values())
    assert sum(rigl.sparsifier.counts.values()) == target


@pytest.mark.parametrize(
    ("method", "steps"),
    [("gradual", 30), ("gemminer", 101), ("snip", 12), ("synflow", 12), ("static", 12), ("dnw", 12)],
)
def test_one_that_has_two_or_is_meant_to_have_one_is_not(method, steps, recwarn):
    trainer(RigLCallback(0.9, method, seed=0), max_steps=steps, max_epochs=-1).fit(small(), data())
    assert not [w for w in recwarn if "RigLCallback" in str(w.message)]


def test_it_is_said_once_and_not_of_what_is_done():
    callback, module = RigLCallback(0.9, "gradual", seed=0), small()
    with pytest.warns(UserWarning, match="prunes from dense"):
        trainer(callback, max_steps=12, max_epochs=-1).fit(module, data())
    callback._said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(callback, max_steps=12, max_epochs=-1).fit(module, data())
    assert not [w for w in said if "prunes from dense" in str(w.message)]
