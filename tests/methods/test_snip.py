"""SNIP: one look at |w g|, in place of the first step.

    index         0     1     2     3     4     5
    weight      1.0  -2.0   0.5  -0.1   3.0   0.0
    gradient    0.1   0.2  -2.0   9.0   0.1   5.0
    |w g|       0.1   0.4   1.0   0.9   0.3   0.0      by it the connections rank 2, 3, 1, 4, 0, 5

The largest weight (4) and the largest gradients (3, 5) do not decide alone.
"""

import pytest
import torch
from torch import nn

from lightning_rigl import FLOPsCallback, RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.methods.base import Connections, Moment
from lightning_rigl.methods.snip import SNIP, SNIPGlobal
from lightning_rigl.topology.patterns import Unstructured
from tests.callbacks.flops_problems import F_D, Counts, Silent
from tests.callbacks.problems import data, small, trainer
from tests.callbacks.stateful_loader import adamw, run, same, sgd
from tests.methods.pruning import NAMES, TARGETS, loss_of, lowest, snapshot, training
from tests.model.problems import batches, network

WEIGHT = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, 0.0])
GRADIENT = torch.tensor([0.1, 0.2, -2.0, 9.0, 0.1, 5.0])


def layer(weight=WEIGHT, gradient=GRADIENT, target=2):
    return Connections(weight, torch.ones_like(weight).bool(), gradient, torch.Generator(), target)


@pytest.mark.parametrize(("target", "kept"), [(1, [2]), (2, [2, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4])])
def test_by_hand(target, kept):
    seen = layer(target=target)
    ((dropped, grown),) = SNIP().turnover([seen], Moment(0))
    mask = Unstructured().drop(SNIP().drop_score(seen), seen.mask, dropped)
    assert (mask.nonzero().view(-1).tolist(), grown) == (kept, 0)


def test_one_ranking_of_two_layers_by_hand():
    """|w g| of the other layer: 0.35 and 0.05; of the six best five are here."""
    other = layer(torch.tensor([0.35, 0.5]), torch.tensor([1.0, 0.1]), target=1)
    assert SNIPGlobal().turnover([layer(target=3), other], Moment(0)) == [(3, 0), (1, 0)]
    assert SNIPGlobal().turnover([layer(target=1), other], Moment(0)) == [(4, 0), (2, 0)]  # an empty layer


@pytest.mark.parametrize("method", [SNIP(), SNIPGlobal()], ids=str)
def test_the_first_step_prunes_and_changes_no_weight_that_stays(method):
    model, reference, (first, *_) = network(torch.float64), network(torch.float64), batches(1, torch.float64)
    loss_of(reference, first).backward()
    scores = {n: (reference.get_parameter(n) * reference.get_parameter(n).grad).abs() for n in NAMES}
    masks = {n: torch.ones_like(score).bool() for n, score in scores.items()}
    for pool in [list(NAMES)] if method == SNIPGlobal() else [[name] for name in NAMES]:
        count = sum(scores[n].numel() - TARGETS[n] for n in pool)
        masks |= lowest({n: scores[n] for n in pool}, masks, count)

    run = training(method, 20, model=model)
    assert all(mask.all() for mask in next(run).masks.values())
    for done, sparsifier in enumerate(run):
        assert sum(sparsifier.counts.values()) == 88
        assert sparsifier.counts == TARGETS or method == SNIPGlobal()
        assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())
        assert sparsifier.updates == 1
        if done == 0:
            for name, parameter in model.named_parameters():
                before = reference.get_parameter(name).detach()
                assert torch.equal(parameter, before * masks[name] if name in masks else before)
    for name in NAMES:
        assert scores[name][masks[name]].min() >= scores[name][~masks[name]].max() or method == SNIPGlobal()
    kept = torch.cat([scores[n][masks[n]] for n in NAMES])
    dropped = torch.cat([scores[n][~masks[n]] for n in NAMES])
    assert kept.min() >= dropped.max() or method == SNIP()


def test_ties_do_not_change_a_count():
    """A threshold keeps all equal scores: here, with weights of zero, every connection of a layer."""
    model = network(torch.float64)
    nn.init.zeros_(model[2].weight)
    *_, sparsifier = training("snip", 1, model=model)
    assert sparsifier.counts == TARGETS
    assert sparsifier.masks["2.weight"].view(-1)[:32].all()


@pytest.mark.parametrize("method", ["snip", "snipglobal"])
def test_gradients_that_are_not_finite_at_first_put_it_off(method):
    """As in 16-bit training, whose loss scale is too large at first; one chance would leave it dense."""
    model, data = network(torch.float64), batches(6, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, 0.75, method)
    sparsifier.start(20)
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        (loss_of(model, batch) * (torch.inf if step < 3 else 1)).backward()
        assert sparsifier.before_step(optimizer, step) == (step == 3)
        if step >= 3:
            optimizer.step()
        sparsifier.after_step()
        assert (sparsifier.density < 0.26) == (step >= 3)


def test_accumulated_batches_are_looked_at_together():
    masks = []
    for settings in ({"batch_size": 16}, {"batch_size": 4, "accumulate": 4}):
        callback = RigLCallback(0.8, "snip")
        loop = trainer(callback, max_epochs=3, accumulate_grad_batches=settings.pop("accumulate", 1))
        loop.fit(small(dtype=torch.float64), data(dtype=torch.float64, **settings))
        masks.append(callback.masks)
        assert callback.sparsifier.counts == {"net.0.weight": 58, "net.2.weight": 40}
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("method", ["snip", "snipglobal"])
def test_flops_the_first_step_is_dense(method):
    sparse, counter = RigLCallback(0.8, method), FLOPsCallback()
    trainer(sparse, counter, counts := Counts(sparse), max_epochs=2).fit(Silent(), data())
    assert [f_s for _, f_s in counts.batches] == [F_D, *[196] * 15]
    assert counter.report().train == 3 * 8 * (F_D + 15 * 196)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("method", ["snip", "snipglobal"])
def test_a_resumed_run_ends_as_the_undisturbed_one(method, optimizer, tmp_path):
    straight = run(tmp_path, RigLCallback(0.8, method), module=small(optimizer=optimizer))
    assert straight["sparsity"]["updates"] == 1
    for step in (1, 2, 8):
        resume, module = tmp_path / f"step={step}.ckpt", small(seed=1, optimizer=optimizer)
        again = run(tmp_path / "again", RigLCallback(0.8, method), module=module, resume=resume)
        assert same(straight, again), step


def test_a_schedule_of_the_users_own_prunes_at_its_first_update():
    before = None
    for done, sparsifier in enumerate(training("snip", 12, UpdateSchedule(every=4, end=12))):
        assert (sparsifier.counts == TARGETS) == (done > 4)
        if done > 5:
            assert all(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())
        before = snapshot(sparsifier)


def test_a_run_that_goes_on_from_a_dense_checkpoint_is_told_that_it_stays_dense(tmp_path):
    module = small()
    first = trainer(max_epochs=2)
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.warns(
        UserWarning, match="the last is due before step 10, and this training goes on from step"
    ):
        trainer(RigLCallback(0.8, SNIP()), max_epochs=4).fit(
            module, data(), ckpt_path=tmp_path / "dense.ckpt"
        )


def test_a_layer_that_is_emptied_can_be_saved_and_loaded():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, 0.8, SNIPGlobal())
    sparsifier.start()
    x, y = batches(1)[0]
    nn.functional.mse_loss(model(x), y).backward()
    sparsifier.layers["2.weight"].parameter.grad.zero_()
    assert sparsifier.before_step(optimizer, 0)
    assert sparsifier.counts["2.weight"] == 0
    again = Sparsifier(network(), 0.8, SNIPGlobal())
    again.load_state_dict(sparsifier.state_dict())
    assert again.counts == sparsifier.counts
