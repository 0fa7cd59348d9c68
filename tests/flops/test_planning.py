"""Before training: the cost of a model, of its run, and the length or the sparsity that a cost allows."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.paper_networks import ResNet50
from lightning_rigl import ER, ERK, Gradual, Method, PerLayer, Uniform, UpdateSchedule
from lightning_rigl.flops.costs import CostTable, LayerCost
from lightning_rigl.flops.measure import cost_table, measure, measurement
from lightning_rigl.flops.planning import plan_flops, sparsity_for_ratio, steps_for_budget
from lightning_rigl.flops.size import model_bytes

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())
NETS = [name for name, net in GOLDEN.items() if isinstance(net, dict) and "cases" in net]
CASES = [(net, case) for net in NETS for case in GOLDEN[net]["cases"]]
LENET = {"0.weight": ((300, 784), 1), "2.weight": ((100, 300), 1), "4.weight": ((10, 100), 1)}


def lenet():
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def shapes_of(net):
    return {name: (row["shape"], row["positions"]) for name, row in GOLDEN[net]["params"].items()}


def distribution_of(net, name):
    in_pool = set(GOLDEN[net]["dense_under_uniform"]) & set(GOLDEN[net]["maskable"])
    return {"uniform": Uniform(dense_first=bool(in_pool)), "er": ER(), "erk": ERK()}[name]


def official_resnet50():
    """The counter behind the published numbers takes the first output for 115 x 115."""
    shapes = shapes_of("resnet50")
    return {**shapes, "conv1.weight": (shapes["conv1.weight"][0], 115 * 115)}


@pytest.fixture(scope="module")
def resnet50():
    return measurement(ResNet50(), (2, 3, 224, 224))


# ------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("net", "case"), CASES, ids=[f"{n}-{c['distribution']}-{c['sparsity']}" for n, c in CASES]
)
def test_bare_shapes_cost_what_the_golden_tables_say(net, case):
    golden = GOLDEN[net]
    table = CostTable(cost_table(shapes_of(net)).layers, golden["param_free_fwd_flops"])
    plan = plan_flops(
        table,
        sparsity=case["sparsity"],
        distribution=distribution_of(net, case["distribution"]),
        include=[f"^{re.escape(name)}$" for name in golden["maskable"]],
    )
    assert plan.cost.forward == case["fwd_sparse_macs2_from_nnz"]
    assert plan.cost.forward_dense == golden["fwd_dense_macs2"]
    assert {row.name: row.active for row in plan.layers if row.name in case["nnz"]} == case["nnz"]
    for method in ("static", "set", "snip", "snfs"):
        assert plan.training[method] == pytest.approx(case["train_ratio"][method], abs=1e-4)


@pytest.mark.parametrize(
    "case", GOLDEN["resnet50"]["cases"], ids=lambda c: f"{c['distribution']}-{c['sparsity']}"
)
def test_a_measured_resnet50_is_golden(resnet50, case):
    plan = plan_flops(
        resnet50, sparsity=case["sparsity"], distribution=distribution_of("resnet50", case["distribution"])
    )
    assert plan.cost.forward == case["fwd_sparse_macs2_from_nnz"]
    assert plan.cost.actual == case["train_actual_from_nnz"]
    assert plan.cost.actual_update == case["train_actual_update_step_from_nnz"]


@pytest.mark.parametrize(
    ("sparsity", "uniform", "erk", "rigl_uniform", "rigl_erk"),
    [
        (0.8, 0.2254, 0.4153, 0.2279, 0.4172),
        (0.9, 0.1285, 0.2431, 0.1314, 0.2456),
        (0.95, 0.0801, 0.1230, 0.0831, 0.1259),
        (0.965, 0.0656, 0.0865, 0.0687, 0.0895),
    ],
)
def test_the_official_ratios_of_resnet50(sparsity, uniform, erk, rigl_uniform, rigl_erk):
    for distribution, forward, rigl in [("uniform", uniform, rigl_uniform), ("erk", erk, rigl_erk)]:
        plan = plan_flops(
            official_resnet50(), sparsity=sparsity, distribution=distribution, convention="official"
        )
        assert plan.cost.forward_dense == 8_202_340_776
        assert plan.forward_ratio == pytest.approx(forward, abs=1e-4)
        assert plan.training["rigl"] == pytest.approx(rigl, abs=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "distribution", "megabytes"),
    [
        (0.0, "erk", 102.122),
        (0.8, "uniform", 23.729),
        (0.8, "erk", 23.684),
        (0.9, "uniform", 13.532),
        (0.9, "erk", 13.499),
        (0.95, "uniform", 8.433),
        (0.95, "erk", 8.399),
        (0.965, "uniform", 6.904),
        (0.965, "erk", 6.869),
        (0.99, "uniform", 4.354),
    ],
)
def test_published_sizes_of_resnet50(resnet50, sparsity, distribution, megabytes):
    for source in (resnet50, official_resnet50()):
        plan = plan_flops(source, sparsity=sparsity, distribution=distribution, convention="official")
        assert round(plan.bytes_sparse / 1e6, 3) == megabytes
        assert round(plan.bytes_dense / 1e6, 3) == 102.122


def test_the_size_of_a_model_is_that_of_all_its_parameters():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    plan = plan_flops(model, torch.zeros(2, 3, dtype=torch.int64), sparsity=0.5)
    total = sum(parameter.numel() for parameter in model.parameters())
    inactive = sum(row.total - row.active for row in plan.layers)
    assert plan.bytes_dense == 4 * total
    assert plan.bytes_sparse == 4 * (total - inactive) + (8 * 16 + 16 * 4) // 8


def test_a_dense_layer_has_no_bit_mask_and_the_last_byte_is_filled_up():
    weights = {"a": (3, 3), "b": (3, 3)}
    assert model_bytes(weights, {}, 0) == model_bytes(weights, {"a": 9}, 0) == 72
    assert model_bytes(weights, {"a": 8}, 0) == 4 * 17 + 2


def test_a_model_a_table_and_bare_shapes_have_one_plan():
    model, example = lenet(), torch.zeros(64, 784)
    whole = plan_flops(model, example, steps=1000)
    for source in (measure(model, example), LENET, measurement(model, example)):
        plan = plan_flops(source, steps=1000, batch_size=64)
        assert (plan.layers, plan.cost, plan.run) == (whole.layers, whole.cost, whole.run)


@pytest.mark.parametrize("every", [10, 1000])
def test_the_methods_are_compared_at_one_distance_of_updates(every):
    schedule = UpdateSchedule(every=every, end=10_000)
    ratios = [plan_flops(LENET, method=m, schedule=schedule).training for m in ("rigl", "set", "static")]
    assert ratios[0] == ratios[1] == ratios[2]
    mean = (3 * 53_242 * every + 2 * 53_242 + 532_400) / (every + 1)
    assert ratios[0]["rigl"] == pytest.approx(mean / (3 * 532_400))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lenet(), {}, "Sequential: give an input, or its shape"),
        (LENET, {"exclude": ["weight"]}, "of 3 weights of two or more dimensions none is left"),
        (LENET, {"exclude": ["conv"]}, "'conv' matches no layer; near misses"),
        (LENET, {"sparsity": 1.0}, r"must lie in \[0, 1\), got 1.0"),
        (LENET, {"steps": 0}, "at least 1, got 0"),
        (LENET, {"batch_size": 0}, "at least 1, got 0"),
        (LENET, {"steps": 10.5}, "at least 1, got 10.5"),
        (LENET, {"steps": True}, "at least 1, got True"),
        (LENET, {"batch_size": 2.5}, "at least 1, got 2.5"),
        ("lenet", {}, "a torch.nn.Module, a CostTable or bare shapes.* got str"),
        ([(300, 784)], {}, "got list"),
        (LENET, {"convention": "macs"}, "the known ones are 2mac, official"),
        (LENET, {"method": "riggle"}, "the known ones are .*rigl.*, set, .*static"),
        (measurement(LENET), {"include": ["0"]}, "a Measurement has its layers"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_plan_that_makes_no_sense_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        plan_flops(source, **options)


def test_a_method_that_prunes_along_says_how():
    class Halving(Gradual):
        planned = Method.planned

    with pytest.raises(ValueError, match=r"method Halving starts dense .* give it planned\(size, target"):
        plan_flops(LENET, method=Halving(), steps=100)
    costs = [plan_flops(LENET, method=m, steps=1000).run.train for m in ("gemminer", "dnw")]
    assert costs[0] > costs[1]


def test_an_example_without_a_model_is_refused():
    with pytest.raises(ValueError, match="an example is for a model"):
        plan_flops(LENET, (64, 784))


# ----------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("method", ["rigl", "static"])
def test_extended_training_costs_what_dense_training_costs(resnet50, distribution, method):
    options = {
        "distribution": distribution,
        "method": method,
        "schedule": UpdateSchedule(every=100, end=0.78),
    }
    steps = steps_for_budget(resnet50, budget="1.0x", steps=32_000, **options)
    plan = plan_flops(resnet50, steps=steps, **options)
    dense = 32_000 * 3 * plan.cost.forward_dense * plan.batch_size
    assert plan.run.train <= dense < plan_flops(resnet50, steps=steps + 1, **options).run.train
    assert steps / 32_000 == pytest.approx(1 / plan.training_ratio, rel=1e-4)


def test_the_extended_training_of_resnet50_at_ninety_per_cent(resnet50):
    """A step in a hundred costs 2 f_S + f_D, up to 78 % of the new length: over four times the steps."""
    sparse, dense = 1_977_917_020, 8_178_368_512
    mean = 3 * sparse + 0.78 / 100 * (dense - sparse)
    schedule = UpdateSchedule(every=100, end=0.78)
    for times in (1, 5):
        steps = steps_for_budget(resnet50, budget=f"{times}x", steps=32_000, schedule=schedule)
        assert steps == pytest.approx(times * 32_000 * 3 * dense / mean, abs=10)
        assert steps // 1000 == {1: 131, 5: 656}[times]


def test_a_budget_in_flops_is_that_of_the_batches(resnet50):
    step = 3 * resnet50.table.layers[0].forward  # of the dense first layer alone
    table = {"conv1.weight": ((64, 3, 7, 7), 112 * 112), "fc.weight": ((10, 64), 1)}
    known = {"sparsity": 0.0, "method": "static", "include": ["fc"]}
    assert steps_for_budget(table, budget=100 * (step + 3 * 1280), batch_size=4, **known) == 25
    assert steps_for_budget(table, budget=f"{100 * (step + 3 * 1280) - 1}", batch_size=4, **known) == 24


def test_a_multiple_of_an_unknown_length_and_less_than_a_step_are_refused():
    with pytest.raises(ValueError, match="whose length is unknown; give its steps"):
        steps_for_budget(LENET, budget="1.0x")
    with pytest.raises(
        ValueError, match=r"the first step of 64 samples costs 10,222,464; give more .a multiple.*, or fewer"
    ):
        steps_for_budget(LENET, budget=10_222_463, batch_size=64)
    with pytest.raises(ValueError, match=r"has an x, as '1\.0x'"):
        steps_for_budget(LENET, budget=0.5, steps=1000)


# ---------------------------------------------------------------------------------------- the sparsity


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize("of", ["inference", "training"])
@pytest.mark.parametrize("steps", [None, 500])
def test_the_sparsity_is_the_smallest_that_reaches_the_ratio(resnet50, distribution, of, steps):
    def reached(sparsity):
        plan = plan_flops(resnet50, sparsity=sparsity, distribution=distribution, steps=steps)
        return plan.forward_ratio if of == "inference" else plan.training_ratio

    sparsity = sparsity_for_ratio(resnet50, ratio=0.25, of=of, distribution=distribution, steps=steps)
    size = sum(math.prod(shape) for shape in resnet50.shapes.values())
    assert reached(sparsity) <= 0.25 < reached(sparsity - 1.5 / size)
    assert reached(sparsity) == pytest.approx(0.25, abs=1e-5)


def test_equal_flops_as_in_the_reproducibility_report():
    """At the FLOPs of ERK at .9 the uniform network may keep more than twice the connections."""
    shapes = official_resnet50()
    erk = plan_flops(shapes, sparsity=0.9, convention="official")
    outputs = sum(shape[0] * positions for shape, positions in shapes.values())
    first = 2 * 64 * 3 * 7 * 7 * 115 * 115
    density = (erk.cost.forward - outputs - first) / (erk.cost.forward_dense - outputs - first)
    options = {"ratio": erk.forward_ratio, "convention": "official"}
    assert sparsity_for_ratio(shapes, **options) == pytest.approx(0.9, abs=1e-6)
    uniform = sparsity_for_ratio(shapes, distribution="uniform", **options)
    assert uniform == pytest.approx(1 - density, abs=1e-5)  # each layer keeps a whole number
    assert 0.78 < uniform < 0.79


def test_a_ratio_of_one_needs_no_sparsity():
    assert sparsity_for_ratio(LENET, ratio=1.0) == 0


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        (0.5, {"distribution": "uniform"}, r"from 0\.8836 at sparsity 0.999\d+ to 1 at sparsity 0"),
        (0.003, {"of": "training"}, r"training FLOPs of 0.003 .* from 0.0033\d* at sparsity"),
        (1.1, {}, "to 1 at sparsity 0"),
        (0, {}, "cannot be reached"),
        (float("nan"), {}, "cannot be reached"),
        ("0.5", {}, "cannot be reached"),
        (0.2, {"distribution": PerLayer({".": 0.5})}, r"from 0\.5 .* to 0\.5 "),
    ],
    ids=str,
)
def test_a_ratio_out_of_reach_is_refused_with_those_in_reach(ratio, options, message):
    with pytest.raises(ValueError, match=message):
        sparsity_for_ratio(LENET, ratio=ratio, **options)


def test_a_ratio_of_something_else_is_refused():
    with pytest.raises(ValueError, match="'inference' or of 'training', got 'memory'"):
        sparsity_for_ratio(LENET, ratio=0.5, of="memory")


# ----------------------------------------------------------------------------------------- the tables


def numbers(cells):
    return [int(cell.replace(",", "")) for cell in cells if cell]


@pytest.mark.parametrize("convention", ["2mac", "official"])
def test_printed_rows_add_up_to_the_printed_total(convention):
    table = CostTable((*cost_table(LENET).layers, LayerCost("bias.scale", (10,), 20, 10)), other=77)
    plan = plan_flops(table, convention=convention)
    printed = plan.layer_table()
    for column in (2, 4, 5):
        assert sum(numbers(row[column] for row in printed.rows)) == numbers([printed.total[column]])[0]
    assert plan.cost.forward == numbers([printed.total[4]])[0]
    rows = list(csv.DictReader(io.StringIO(plan.to_csv())))
    for column in ("active", "total", "forward", "forward_dense"):
        *parts, total = numbers(row[column] for row in rows)
        assert sum(parts) == total


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_the_plan_says_what_it_does_not_know():
    table = CostTable(cost_table(LENET).layers, unknown=("aten.mul (0.weight)",))
    assert "not counted: aten.mul (0.weight)" in str(plan_flops(table))
    plan = plan_flops(Idle(), (2, 4), sparsity=0.5)
    assert plan.unseen == ("spare.weight",)
    assert "sparse, but in no product: spare.weight" in str(plan)


def test_json_holds_every_number():
    plan = plan_flops(LENET, steps=1000, batch_size=64).within("1.0x")
    read = json.loads(plan.to_json())
    assert read == plan.to_dict()
    assert (read["steps"], read["updates"]) == (plan.steps, plan.updates)
    assert (read["train"], read["train_dense"]) == (plan.run.train, plan.run.train_dense)
    assert read["train_actual"] == plan.run.train_actual
    assert read["budget"] == 1000 * 64 * 3 * 532_400 >= read["train"]
    assert read["training_ratios"] == plan.training
    assert (read["bytes"], read["bytes_dense"]) == (plan.bytes_sparse, plan.bytes_dense)
    assert f"{plan.steps:,} steps of 64 samples" in str(plan)
    assert json.loads(plan_flops(LENET).to_json())["train"] is None
