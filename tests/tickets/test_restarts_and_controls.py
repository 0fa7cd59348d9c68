"""The recipes of docs/lottery-tickets.md: given masks with other weights, given weights with other masks."""

import copy

import pytest
import torch

from lightning_rigl import RigLCallback, UpdateSchedule, load_masks
from lightning_rigl.model.mask_controls import shuffled
from tests.callbacks.stateful_loader import same
from tests.tickets.problems import Net, Trainers, loader, tickets

SCHEDULE = UpdateSchedule(every=3, end=9, drop_fraction=0.5)


def fit(module, **settings):
    trainers, rigl = Trainers(enable_checkpointing=False), RigLCallback(seed=0, **settings)
    trainers([rigl]).fit(module, loader())
    return rigl, trainers.watches[0].start["weights"]


class TestTheFinalMaskOfRigLAndTheFirstWeights:
    @pytest.fixture
    def found(self):
        module = Net()
        initial = copy.deepcopy(module.state_dict())
        rigl, _ = fit(module, sparsity=0.8, schedule=SCHEDULE)
        torch.save(rigl.masks, "rigl.pt")
        return initial, load_masks("rigl.pt")

    def again(self, initial, **settings):
        module = Net()
        module.load_state_dict(initial)
        return fit(module, init="rigl.pt", schedule=SCHEDULE, **settings)

    def test_both_begin_with_that_mask_and_these_weights(self, found):
        initial, masks = found
        for method in ("static", "rigl"):
            _, start = self.again(initial, method=method)
            for name, value in start.items():
                assert torch.equal(value, initial[name] * masks[name] if name in masks else initial[name])

    def test_one_keeps_it_and_the_other_does_not(self, found):
        initial, masks = found
        static, rigl = (self.again(initial, method=method)[0] for method in ("static", "rigl"))
        assert same(masks, dict(static.masks))
        assert not same(masks, dict(rigl.masks))
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        assert {name: int(mask.sum()) for name, mask in rigl.masks.items()} == counts


class TestControlsOfATicket:
    @pytest.fixture
    def ticket(self):
        return tickets(rounds=1).run(loader())[1]

    def test_other_first_weights(self, ticket):
        torch.manual_seed(9)
        static, start = fit(Net(), method="static", init=ticket.checkpoint)
        torch.manual_seed(9)
        other = Net().state_dict()
        masks = load_masks(ticket.checkpoint)
        assert same(masks, dict(static.masks))
        assert all(torch.equal(start[name], other[name] * mask) for name, mask in masks.items())

    def test_a_shuffled_mask(self, ticket):
        masks = load_masks(ticket.checkpoint)
        torch.save(shuffled(masks, seed=0), "shuffled.pt")
        static, _ = fit(Net(), method="static", init="shuffled.pt")
        for name, mask in static.masks.items():
            assert int(mask.sum()) == int(masks[name].sum())
            assert not torch.equal(mask, masks[name])
