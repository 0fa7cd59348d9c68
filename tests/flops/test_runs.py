"""A run costs the sum of its steps, and a budget pays for the longest run that stays within it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from lightning_rigl.flops.formulas import RunCost, SampleCost
from lightning_rigl.flops.planning import plan_flops
from lightning_rigl.flops.runs import budget_in_flops, longest_run, run_cost, updates_due

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())


def lenet():
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def test_the_golden_run():
    (run,) = GOLDEN["runs"]
    schedule = UpdateSchedule(every=run["dT"], end=run["T_end"])
    plan = plan_flops(lenet(), (run["batch"], 784), steps=run["steps"], schedule=schedule)
    assert (plan.cost.forward, plan.updates) == (run["fS_from_nnz"], len(run["updates"]))
    assert plan.run.train == run["paper_schedule_total"] == 10_437_126_784
    assert plan.run.train_actual == run["actual_total"] == 8_041_606_784
    assert plan.run.train_dense == run["steps"] * run["batch"] * 3 * run["fD"]


class Learner(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


PRUNING = UpdateSchedule(every=3, begin=0.3, end=0.8, policy="after_step")
SCHEDULES = dict.fromkeys(
    ("rigl", "set", "snfs", "static", "riglinverted"), UpdateSchedule(every=3, end=0.75)
)
SCHEDULES |= {"gradual": PRUNING, "snip": None}
UPDATES = {"static": 0, "gradual": 4, "snip": 1}


@pytest.mark.parametrize("method", SCHEDULES)
def test_a_training_costs_what_was_planned(method):
    schedule = SCHEDULES[method]
    flops, rigl = FLOPsCallback(), RigLCallback(0.8, method=method, schedule=schedule)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=20, callbacks=[rigl, flops], logger=False, **quiet)
    module = Learner()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(80, 20), batch_size=4))
    plan = plan_flops(module, (4, 20), sparsity=0.8, method=method, schedule=schedule, steps=20)
    report = flops.report()
    assert plan.updates == rigl.sparsifier.updates == UPDATES.get(method, 4)
    assert (plan.run.train, plan.run.train_dense) == (report.train, report.train_dense)
    assert plan.run.train_actual == report.train_actual


moments = st.one_of(st.integers(0, 200), st.floats(0.01, 1.0))
costs = st.tuples(st.integers(1, 50), st.integers(0, 500)).map(lambda c: SampleCost(c[0], sum(c)))
gradients = st.sampled_from(["never", "at_updates", "every_step"])


@st.composite
def schedules(draw):
    every, begin, end = draw(st.integers(1, 40)), draw(moments), draw(moments)
    assume(type(begin) is not type(end) or begin < end)
    return UpdateSchedule(every=every, begin=begin, end=end)


def step_by_step(cost, steps, gradient, schedule, batch_size=1):
    run, timetable = RunCost(), schedule.resolve(steps)
    for step in range(steps):
        run = run.after(batch_size, cost, gradient=gradient, updated=timetable.due(step, last=step - 1))
    return run


@given(schedules(), st.integers(1, 300))
def test_the_updates_are_those_that_the_timetable_names(schedule, steps):
    timetable = schedule.resolve(steps)
    assert updates_due(schedule, steps) == sum(timetable.due(t, last=t - 1) for t in range(steps))


@given(costs, st.integers(1, 100), gradients, schedules(), st.integers(1, 9))
def test_a_run_costs_the_sum_of_its_steps(cost, steps, gradient, schedule, batch_size):
    expected = step_by_step(cost, steps, gradient, schedule, batch_size)
    assert run_cost(cost, steps, gradient, schedule, batch_size) == expected


@given(costs, st.integers(1, 3000), gradients, schedules())
def test_the_longest_run_is_the_longest_of_all(cost, budget, gradient, schedule):
    most = budget // run_cost(cost, 1, gradient).train
    spent = [run_cost(cost, steps, gradient, schedule).train for steps in range(most + 1)]
    longest = max(steps for steps in range(most + 1) if spent[steps] <= budget)
    if longest:
        assert longest_run(budget, cost, gradient, schedule) == longest
    else:
        with pytest.raises(ValueError, match="the first step of 1 samples costs"):
            longest_run(budget, cost, gradient, schedule)


def test_gradual_pruning_costs_what_the_closed_form_says_over_a_long_training():
    shapes = {"a": ((300, 784), 1), "b": ((100, 300), 1), "c": ((10, 100), 1)}
    plan = plan_flops(shapes, sparsity=0.9, distribution="uniform", method="gradual")
    assert plan.training_ratio == pytest.approx(plan.training["gradual_pruning"], abs=0.01)
    within = plan_flops(shapes, method="gradual", steps=1000).within("1.0x")
    spent = [
        plan_flops(shapes, method="gradual", steps=n).run.train for n in (within.steps, within.steps + 1)
    ]
    assert spent[0] <= within.budget < spent[1]


def test_a_step_that_costs_nothing_is_refused():
    with pytest.raises(ValueError, match="the first step of 2 samples costs 0"):
        longest_run(100, SampleCost(0, 0), batch_size=2)


def test_a_step_more_can_be_an_update_less():
    """Where ``begin`` is a fraction the updates move with the length: 105 steps cost more than 106."""
    cost, schedule = SampleCost(1, 10), UpdateSchedule(every=1, begin=0.5, end=0.6)
    spent = [run_cost(cost, steps, schedule=schedule).train for steps in (104, 105, 106, 107)]
    assert spent == [402, 414, 408, 420]
    assert longest_run(411, cost, schedule=schedule) == 106


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("1.0x", 20_000), ("0.5X", 10_000), (".25x", 5_000), ("3e3", 3_000), (1e18, 10**18)],
)
def test_a_budget_is_a_multiple_or_a_number(budget, expected):
    assert budget_in_flops(budget, dense_step=2_000, steps=10) == expected


@pytest.mark.parametrize("budget", ["x", "1.0y", "-1x", -5.0, float("nan"), float("inf"), True, "1 x", None])
def test_another_budget_is_refused(budget):
    with pytest.raises(ValueError, match="budget: a multiple of the dense training such as"):
        budget_in_flops(budget, 2_000, 10)
