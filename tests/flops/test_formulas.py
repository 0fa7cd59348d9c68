"""Active counts and a table of layer costs -> exact FLOPs, against the golden tables of three networks."""

import io
import json
from pathlib import Path

import pytest

from lightning_rigl.flops.formulas import (
    CostTable,
    LayerCost,
    RunCost,
    check_convention,
    forward_cost,
    step_cost,
)
from lightning_rigl.flops.report import report

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())
NETS = ["lenet_300_100", "wrn22_2", "mobilenet_v1"]
CASES = [(net, case) for net in NETS for case in GOLDEN[net]["cases"]]
CASE_IDS = [f"{net}-{case['distribution']}-{case['sparsity']}" for net, case in CASES]
LAYER = LayerCost("fc.weight", (10, 100), forward=2000, outputs=10)


def golden_table(net):
    """Rows of the golden table; an output element belongs to each position and output channel."""
    rows = GOLDEN[net]["params"].items()
    layers = (
        LayerCost(n, tuple(r["shape"]), r["fwd_flops"], r["positions"] * r["shape"][0]) for n, r in rows
    )
    return CostTable(tuple(layers))


@pytest.mark.parametrize("net", NETS)
def test_dense_cost_is_golden_under_both_conventions(net):
    table = golden_table(net)
    assert forward_cost(table) == GOLDEN[net]["fwd_dense_macs2"]
    assert forward_cost(table, convention="official") == GOLDEN[net]["fwd_dense_paper_rule"]


@pytest.mark.parametrize(("net", "case"), CASES, ids=CASE_IDS)
def test_sparse_cost_is_golden_to_the_last_digit(net, case):
    assert forward_cost(golden_table(net), case["nnz"]) == case["fwd_sparse_macs2_from_nnz"]


@pytest.mark.parametrize(("net", "case"), CASES, ids=CASE_IDS)
def test_official_ratio_is_golden(net, case):
    table = golden_table(net)
    sparse = forward_cost(table, case["nnz"], "official")
    assert sparse / forward_cost(table, convention="official") == pytest.approx(
        case["ratio_paper_rule"], abs=1e-4
    )


@pytest.mark.parametrize(("net", "case"), CASES, ids=CASE_IDS)
def test_training_ratios_of_appendix_h_are_golden(net, case):
    table = golden_table(net)
    dense, sparse = forward_cost(table), forward_cost(table, case["nnz"])
    static, snfs = step_cost(sparse, dense, False), step_cost(sparse, dense, True)
    rigl = (100 * static + snfs) / 101
    measured = {"static": static, "snfs": snfs, "rigl_dt100": rigl}
    expected = {name: case["train_ratio"][name] for name in measured}
    assert {name: cost / (3 * dense) for name, cost in measured.items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["net"])
def test_a_whole_run_by_its_schedule_is_golden(run):
    cost = RunCost()
    for step in range(run["steps"]):
        updated = step in run["updates"]
        cost = cost.after(
            run["batch"], run["fS_from_nnz"], run["fD"], gradient="at_updates", updated=updated, stepped=True
        )
    assert cost.train == run["paper_schedule_total"] == 10_437_126_784
    assert cost.train_dense == 3 * run["fD"] * run["steps"] * run["batch"]


F_S, F_D = 10, 100


@pytest.mark.parametrize(
    ("gradient", "ordinary", "update"),
    [
        ("never", 3 * F_S, 3 * F_S),
        ("at_updates", 3 * F_S, 2 * F_S + F_D),
        ("every_step", 2 * F_S + F_D, 2 * F_S + F_D),
    ],
)
def test_a_method_pays_for_the_dense_gradient_when_it_reads_it(gradient, ordinary, update):
    assert RunCost().after(7, F_S, F_D, gradient=gradient, updated=False).train == 7 * ordinary
    assert RunCost().after(7, F_S, F_D, gradient=gradient, updated=True).train == 7 * update


def test_an_update_reads_the_dense_gradient_of_its_whole_accumulation_window_and_no_other():
    cost = RunCost()
    windows = [([4, 4], False), ([4, 4, 1], True), ([4, 4], False)]
    for batches, updated in windows:
        for i, samples in enumerate(batches):
            last = i == len(batches) - 1
            cost = cost.after(
                samples, F_S, F_D, gradient="at_updates", updated=updated and last, stepped=last
            )
    assert cost.train == 16 * 3 * F_S + 9 * (2 * F_S + F_D)
    assert cost.train_dense == 25 * 3 * F_D
    assert cost.pending == 0


def test_products_without_a_parameter_are_never_scaled():
    table = CostTable((LAYER,), other=64)
    assert forward_cost(table, {"fc.weight": 0}) == 64
    assert forward_cost(table, {"fc.weight": 500}) == 1064


def test_a_cost_that_is_no_multiple_of_the_size_is_rounded_down():
    assert LayerCost("w", (3, 3), forward=10, outputs=0).flops(8) == 8
    assert LayerCost("w", (3, 3), forward=10, outputs=0).flops(9) == 10


def test_integers_stay_exact_beyond_what_floats_hold():
    layer = LayerCost("w", (3, 1), forward=3 * (2**60 + 1), outputs=0)
    assert layer.flops(1) == 2**60 + 1


@pytest.mark.parametrize("active", [-1, 1001])
def test_an_impossible_count_is_refused_by_name(active):
    with pytest.raises(ValueError, match=rf"fc\.weight: {active} active of 1000 connections"):
        forward_cost(CostTable((LAYER,)), {"fc.weight": active})


def test_an_unknown_convention_is_refused_with_the_known_ones():
    check_convention("official")
    with pytest.raises(ValueError, match="'mac'; the known ones are 2mac, official"):
        check_convention("mac")


def test_a_table_comes_back_from_its_state():
    table = CostTable((LAYER,), other=3, unknown=("aten.mul (fc.weight)",))
    state = json.loads(json.dumps(table.state_dict()))
    assert CostTable.from_state_dict(state) == table


@pytest.mark.parametrize("convention", ["2mac", "official"])
@pytest.mark.parametrize("other", [0, 5])
def test_printed_rows_add_up_to_the_printed_total(convention, other):
    case = GOLDEN["wrn22_2"]["cases"][3]
    table = CostTable(golden_table("wrn22_2").layers, other)
    result = report(table, case["nnz"], 1, 2, convention)
    printed = result.table()
    for column, total in [(3, result.forward), (4, result.forward_dense)]:
        cells = [int(row[column].replace(",", "")) for row in printed.rows]
        assert sum(cells) == int(printed.total[column].replace(",", "")) == total
    assert len(printed.rows) == len(table.layers) + bool(other)
    assert result.forward == forward_cost(table, case["nnz"], convention)
    assert int(printed.total[2].replace(",", "")) == case["nnz_total"]
    assert "FLOP = one multiply or one add" in str(result)
    assert convention in str(result)


def test_a_report_names_what_is_not_counted():
    table = CostTable((LAYER,), unknown=("aten.mul (fc.weight)",))
    assert "not counted: aten.mul (fc.weight)" in str(report(table, {}, 0, 0))


def test_a_report_is_a_rich_table():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(report(CostTable((LAYER,)), {"fc.weight": 500}, 3, 6))
    assert "1,000" in console.export_text()
