"""Iterative magnitude pruning: densities, where each round starts from, and what it trains."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_rigl import RigLCallback, load_masks
from lightning_rigl.tickets.magnitude import pruned, to_prune
from tests.callbacks.stateful_loader import StatefulLoader, same
from tests.tickets.problems import STEPS, Net, Seeds, Trainers, end, loader, tickets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*is about to resume|.*resuming from a checkpoint that ended before"),
]
ROUND = 0.9 ** torch.arange(STEPS, dtype=torch.float64) * 0.2  # the learning rate of each step


def test_densities():
    """480 weights: 480, 384, 307 (77 of 384 go, 76.8 rounded up), 245."""
    imp = tickets(rounds=3, prune=0.2)
    done = imp.run(loader())
    assert [(t.round, t.active, t.size, t.steps) for t in done] == [
        (0, 480, 480, 12),
        (1, 384, 480, 12),
        (2, 307, 480, 12),
        (3, 245, 480, 12),
    ]
    assert [t.density for t in done] == [1, 0.8, 307 / 480, 245 / 480]
    assert all(set(t.metrics) >= {"loss", "sparsity/density"} for t in done)
    for ticket in done:
        saved, masks = torch.load(ticket.checkpoint, weights_only=True), load_masks(ticket.checkpoint)
        assert sum(int(mask.sum()) for mask in masks.values()) == ticket.active
        assert all((saved["state_dict"][name][~mask] == 0).all() for name, mask in masks.items())
    table = str(imp.summary())
    assert "307 of 480" in table
    assert table.splitlines()[-1].split() == ["all", "48"]


@pytest.mark.parametrize("rewind", ["init", 5, "learning_rate"])
def test_each_round_is_pruned_by_the_weights_at_the_end_of_the_one_before(rewind):
    done = tickets(rewind=rewind).run(loader())
    for before, after in pairwise(done):
        old = end(before)
        expected = pruned(old["state_dict"], old["masks"], to_prune(0.25, before.active))
        assert same(dict(expected), load_masks(after.checkpoint))


class TestWhereARoundStartsFrom:
    def starts(self, rewind, rounds=2, interval="step"):
        trainers = Trainers()
        done = tickets(model=Seeds(interval=interval), trainer=trainers, rewind=rewind, rounds=rounds).run(
            loader()
        )
        return done, trainers.watches

    def assert_masked(self, weights, original, masks):
        """The original where there is a connection, zero elsewhere; biases, statistics the original."""
        assert weights.keys() == original.keys()
        for name, value in weights.items():
            assert torch.equal(value, original[name] * masks[name] if name in masks else original[name]), name

    def test_the_initialisation(self):
        """Weights, biases, statistics of batch norm; no momentum; the whole schedule."""
        done, watches = self.starts("init")
        for ticket, watch in zip(done, watches, strict=True):
            self.assert_masked(
                watch.start["weights"], watches[0].start["weights"], load_masks(ticket.checkpoint)
            )
            assert (watch.start["step"], watch.start["momentum"]) == (0, {})
            assert watch.rates == pytest.approx(ROUND.tolist())

    @pytest.mark.parametrize("k", [1, 4, 6, 8, 11, 0.5])
    def test_step_k(self, k):
        """Inside an epoch, at its end, near the end of training; the rates are those from step k on."""
        step = 6 if k == 0.5 else k
        trainers = Trainers()
        done = tickets(trainer=trainers, rewind=k).run(loader())
        straight = self.at(step)
        assert [t.steps for t in done] == [12, 12 - step, 12 - step]
        for ticket, watch in zip(done[1:], trainers.watches[1:], strict=True):
            masks = load_masks(ticket.checkpoint)
            assert watch.start["step"] == step
            self.assert_masked(watch.start["weights"], straight["weights"], masks)
            self.assert_masked(watch.start["momentum"], straight["momentum"], masks)
            assert watch.rates == pytest.approx(ROUND[step:].tolist())
            assert torch.load(ticket.checkpoint, weights_only=True)["global_step"] == 12

    def at(self, step):
        """The dense training after so many steps."""
        trainers = Trainers(max_steps=step, enable_checkpointing=False)
        trainer, module = trainers([]), Seeds()()
        trainer.fit(module, loader())
        optimizer = trainer.optimizers[0]
        momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in module.named_parameters()}
        return {"weights": module.state_dict(), "momentum": momentum}

    @pytest.mark.parametrize("k", [3, 4, 5, 8])
    def test_step_k_of_a_schedule_in_epochs(self, k):
        _, watches = self.starts(k, interval="epoch")
        whole = [0.2] * 4 + [0.1] * 4 + [0.05] * 4
        assert watches[0].rates == pytest.approx(whole)
        assert watches[1].rates == pytest.approx(whole[k:])

    def test_step_zero_is_the_initialisation(self):
        first, second = (
            tickets(name, rewind=name if name == "init" else 0).run(loader()) for name in ("init", "0")
        )
        assert same([end(t) for t in first], [end(t) for t in second])

    def test_learning_rate_rewinding(self):
        """Weights and statistics go on, the optimizer and the rate begin anew."""
        done, watches = self.starts("learning_rate")
        for before, ticket, watch in zip(done, done[1:], watches[1:], strict=False):
            self.assert_masked(
                watch.start["weights"], end(before)["state_dict"], load_masks(ticket.checkpoint)
            )
            assert (watch.start["step"], watch.start["momentum"]) == (0, {})
            assert watch.rates == pytest.approx(ROUND.tolist())

    def test_a_loader_with_a_state_goes_on_from_its_place(self):
        """Five of seven batches are past at step k."""
        seen = []

        class Seen(StatefulLoader):
            def __iter__(self):
                for index, batch in enumerate(super().__iter__(), self.position % 7):
                    seen.append(index)
                    yield batch

        tickets(trainer=Trainers(max_epochs=2), rewind=5, rounds=1).run(Seen())
        assert seen == [*range(7), *range(7), 5, 6, *range(7)]


def loop(rounds, prune):
    """Plain PyTorch: train, sort, multiply by the mask in the forward pass."""
    model = Seeds()()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {name: torch.ones_like(model.state_dict()[name]) for name in ("net.0.weight", "net.3.weight")}
    history = []
    for _ in range(rounds + 1):
        model.load_state_dict({n: v * masks[n] if n in masks else v for n, v in initial.items()})
        optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
        for step in range(STEPS):
            x, y = list(loader())[step % 4]
            optimizer.param_groups[0]["lr"] = 0.2 * 0.9**step
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.net(x), y).backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.mul_(mask)
            optimizer.step()
        history.append({n: (v.detach().clone(), masks.get(n)) for n, v in model.state_dict().items()})
        magnitudes = torch.cat([model.get_parameter(n).detach().abs()[m == 1] for n, m in masks.items()])
        threshold = magnitudes.sort().values[-int(-prune * len(magnitudes) // 1) - 1]
        masks = {n: m * (model.get_parameter(n).detach().abs() > threshold) for n, m in masks.items()}
    return history


def test_a_plain_loop_finds_the_same_tickets():
    done = tickets(rounds=3).run(loader())
    for ticket, expected in zip(done, loop(3, 0.25), strict=True):
        found = end(ticket)
        for name, (weight, mask) in expected.items():
            torch.testing.assert_close(found["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
            assert mask is None or torch.equal(found["masks"][name], mask.bool())


@pytest.mark.parametrize("length", [{}, {"max_steps": 10}, {"max_steps": 10, "max_epochs": -1}], ids=str)
def test_a_round_is_a_static_training_from_the_first_weights(length):
    done = tickets(trainer=Trainers(**length), rounds=1).run(loader())
    module = Seeds()()
    static = RigLCallback(method="static", init=str(done[1].checkpoint))
    Trainers(**length)([static]).fit(module, loader())
    assert same(dict(module.state_dict()), dict(end(done[1])["state_dict"]))


@pytest.mark.parametrize("k", [3, 4, 6])
def test_a_length_in_steps(k):
    trainers = Trainers(max_steps=10, max_epochs=-1)
    done = tickets(trainer=trainers, rewind=k).run(loader())
    assert [t.steps for t in done] == [10, 10 - k, 10 - k]
    assert [watch.rates for watch in trainers.watches[1:]] == [pytest.approx(ROUND[k:10].tolist())] * 2


def test_include_and_exclude():
    imp = tickets(rounds=1, exclude=[r"net\.3"])
    assert [(t.active, t.size) for t in imp.run(loader())] == [(384, 384), (288, 384)]
    imp = tickets("other", rounds=1, include=[r"net\.3"])
    assert [(t.active, t.size) for t in imp.run(loader())] == [(96, 96), (72, 96)]


class Late(Net):
    """Its layers are made by the trainer."""

    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def test_a_model_that_is_made_in_configure_model():
    trainers = Trainers()
    done = tickets(model=Late, trainer=trainers).run(loader())
    assert [t.active for t in done] == [480, 360, 270]
    first, last = trainers.watches[0].start["weights"], trainers.watches[2].start["weights"]
    masks = load_masks(done[2].checkpoint)
    assert all(torch.equal(last[n], first[n] * masks[n] if n in masks else first[n]) for n in first)


@pytest.mark.parametrize("rewind", ["init", 3, "learning_rate"])
def test_two_processes(rewind):
    trainers = Trainers(devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    done = tickets(trainer=trainers, rewind=rewind).run(loader())
    assert [t.active for t in done] == [480, 360, 270]
    one = tickets("one", rewind=rewind).run(loader())
    assert all(same(end(t)["masks"], end(other)["masks"]) for t, other in zip(done, one, strict=True))
