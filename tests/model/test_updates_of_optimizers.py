"""What an update reads of its optimizer: gradients that are there, its own rates and its own numbers."""

import pytest
import torch
from torch import nn

from lightning_rigl import DSR, DeepR, Method, RigL, Sparsifier, UpdateSchedule
from lightning_rigl.topology.patterns import Pattern
from tests.model.problems import batches, network

EVERY_STEP = UpdateSchedule(every=1, end=100)


def started(model, method, schedule=EVERY_STEP, **settings):
    sparsifier = Sparsifier(model, 0.8, method, schedule=schedule, seed=0, **settings)
    sparsifier.start(200)
    return sparsifier


def backward(model, x, y):
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


@pytest.mark.parametrize("method", ["rigl", "snip", "snipglobal", "riglsg"])
def test_an_update_without_any_gradient_is_postponed(method):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = started(model, method, None if "snip" in method else EVERY_STEP)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    assert not sparsifier.before_step(optimizer, 1)
    assert (sparsifier.updates, sparsifier.postponed) == (0, 1)
    assert all(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())
    backward(model, *batches(1)[0])
    assert sparsifier.before_step(optimizer, 2)
    assert sparsifier.updates == 1
    assert sparsifier.density == pytest.approx(0.2, abs=0.01)


def test_a_method_that_reads_no_gradient_waits_for_none():
    model = network()
    sparsifier = started(model, "set")
    assert sparsifier.before_step(torch.optim.SGD(model.parameters(), lr=0.1), 1)


def pair(rates):
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    return model, [
        torch.optim.SGD(part.parameters(), lr=rate) for part, rate in zip(model, rates, strict=True)
    ]


@pytest.mark.parametrize("rates", [(0.1, 0.01), (0.01, 0.1)])
def test_a_drop_fraction_that_follows_the_rate_follows_that_of_its_optimizer(rates):
    model, optimizers = pair(rates)
    schedule = UpdateSchedule(every=1, drop_fraction=0.3, decay="learning_rate", end=100)
    sparsifier = started(model, "rigl", schedule)
    for part, optimizer in zip(model, optimizers, strict=True):
        backward(part, torch.randn(4, 8), torch.randn(4, 8))
        sparsifier.before_step(optimizer, 1)
        assert sparsifier.drop_fraction == pytest.approx(0.3)  # no scheduler: the rate has not fallen


def test_dsr_adapts_one_threshold_for_each_optimizer():
    model, optimizers = pair((0.1, 0.1))
    sparsifier = started(model, DSR(1e-6), UpdateSchedule(every=1, drop_fraction=0.5, end=100))
    for optimizer in optimizers:
        sparsifier.before_step(optimizer, 1)
    assert [numbers["threshold"] for numbers in sparsifier.numbers.values()] == [2e-6, 2e-6]


def test_dsr_leaves_a_layer_without_connections_empty():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    masks = {"0.weight": torch.zeros(6, 6, dtype=torch.bool), "1.weight": torch.eye(6, dtype=torch.bool)}
    sparsifier = Sparsifier(model, method=DSR(10.0), init=masks, schedule=EVERY_STEP, seed=0)
    sparsifier.start(200)
    assert sparsifier.before_step(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert sparsifier.counts == {"0.weight": 0, "1.weight": 6}


def test_rates_are_those_of_the_group_that_a_layer_is_in():
    """With loss 0, l1 = 0.1 and a rate of 0.1, each strength loses 0.01; the biases' rate has no say."""
    model = nn.Linear(8, 4)
    groups = [{"params": [model.bias], "lr": 10.0}, {"params": [model.weight], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    sparsifier = Sparsifier(model, 0.5, DeepR(l1=0.1, temperature=0.0), seed=0)
    sparsifier.start(100)
    mask, before = sparsifier.masks["weight"].clone(), model.weight.detach().clone().abs()
    (model(torch.randn(3, 8)).sum() * 0).backward()
    sparsifier.before_step(optimizer, 0)
    optimizer.step()
    sparsifier.after_step()
    stay = mask & (before > 0.02)
    torch.testing.assert_close(
        (before - model.weight.detach().abs())[stay], torch.full((int(stay.sum()),), 0.01)
    )


def test_a_turnover_of_another_length_is_refused():
    class Short(RigL):
        def turnover(self, layers, moment):
            return super().turnover(layers, moment)[:-1]

    model = network()
    sparsifier = started(model, Short())
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match=r"Short.turnover: 1 pairs wanted, got \[\]"):
        sparsifier.before_step(torch.optim.SGD(model.parameters(), lr=0.1), 1)


class Halves(Pattern):
    """A pattern of one's own."""

    def fit(self, shape, count):
        return count

    start = drop = grow = fit


@pytest.mark.parametrize("method", ["dnw", "edgepopup", "globaledgepopup", "gemminer"])
def test_a_method_whose_masks_follow_from_variables_refuses_a_pattern(method):
    name = type(Method.of(method)).__name__
    with pytest.raises(ValueError, match=f"pattern: {name} makes its masks of its variables"):
        Sparsifier(network(), 0.5, method, pattern=Halves())


class Rateless(torch.optim.Optimizer):
    """Calls its rate by another name."""

    def __init__(self, parameters):
        super().__init__(parameters, {"learning_rate": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["learning_rate"])


@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "dsr"])
def test_an_optimizer_without_a_rate_by_torchs_name_serves(method):
    model = network()
    sparsifier, optimizer = started(model, method), Rateless(model.parameters())
    for step, (x, y) in enumerate(batches(3)):
        backward(model, x, y)
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    assert sparsifier.updates == 2


@pytest.mark.parametrize(
    ("method", "schedule", "who"),
    [
        ("deepr", None, "the method"),
        ("rigl", UpdateSchedule(every=1, end=9, decay="learning_rate"), "decay='learning_rate'"),
    ],
)
def test_what_follows_the_rate_asks_for_one(method, schedule, who):
    model = network()
    sparsifier, optimizer = started(model, method, schedule), Rateless(model.parameters())
    backward(model, *batches(1)[0])

    def step():
        sparsifier.before_step(optimizer, 1)
        optimizer.step()

    with pytest.raises(RuntimeError, match=f"{who} follows the learning rate, and Rateless has no 'lr'"):
        step()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((1.0, 1), r"\(dropped, grown\) of 0.weight are two whole numbers, got \(1.0, 1\)"),
        ((1,), "are two whole numbers"),
        ((999, 0), "0.weight cannot drop 999 and grow 0"),
        ((0, 999), "0.weight cannot drop 0 and grow 999"),
        ((-1, 0), "0.weight cannot drop -1"),
    ],
)
def test_a_turnover_that_cannot_be_is_refused_by_name(pair, message):
    class Odd(RigL):
        def turnover(self, layers, moment):
            return [pair for _ in layers]

    model = network()
    sparsifier = started(model, Odd())
    backward(model, *batches(1)[0])
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with pytest.raises(ValueError, match=rf"Odd.turnover: .*{message}"):
        sparsifier.before_step(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert all(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())
