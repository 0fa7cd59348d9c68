"""Active counts and a table of layer costs -> exact FLOPs of a forward pass, of a step and of a run."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl.flops.costs import CostTable, LayerCost, check_convention
from lightning_rigl.flops.formulas import (
    RunCost,
    SampleCost,
    actual_step_cost,
    forward_cost,
    sample_cost,
    sample_cost_of,
    step_cost,
)
from lightning_rigl.flops.report import report

FIRST = LayerCost("conv.weight", (4, 3, 2, 2), 48 * 50, 100, 0, 48 * 50)  # 25 positions
LAYER = LayerCost("fc.weight", (10, 100), 2000, 10, 2000, 2000)
TABLE = CostTable((FIRST, LAYER), other=64, unknown=("aten.mul (fc.weight)",), other_gradient=128)
EMPTY = RunCost()


# ------------------------------------------------------------------------------------- one layer, one pass


def test_a_layer_costs_its_share_of_active_connections():
    assert LAYER.scaled(2000, {}) == LAYER.scaled(2000, {"fc.weight": 1000}) == 2000
    assert LAYER.scaled(2000, {"fc.weight": 500, "conv.weight": 1}) == 1000
    assert LAYER.scaled(2000, {"fc.weight": 0}) == 0


def test_the_official_convention_adds_every_output_element_whatever_is_active():
    assert LAYER.forward_flops({"fc.weight": 500}, "official") == 1010
    assert LAYER.forward_flops({"fc.weight": 0}, "official") == 10
    assert forward_cost(TABLE, {"fc.weight": 500}, "official") == 64 + 2400 + 100 + 1000 + 10


def test_products_without_a_parameter_are_never_scaled():
    nothing = {"fc.weight": 0, "conv.weight": 0}
    assert forward_cost(TABLE, nothing) == 64
    assert actual_step_cost(TABLE, nothing) == 64 + 128


def test_a_cost_that_is_no_multiple_of_the_size_is_rounded_down():
    layer = LayerCost("w", (3, 3), forward=10, outputs=0)
    assert [layer.scaled(10, {"w": active}) for active in (8, 9)] == [8, 10]


def test_integers_stay_exact_beyond_what_floats_hold():
    layer = LayerCost("w", (3, 1), forward=3 * (2**60 + 1), outputs=0)
    assert layer.forward_flops({"w": 1}) == 2**60 + 1


def test_a_slice_is_counted_by_itself_or_has_its_share_of_the_parameter():
    part = LayerCost("in_proj", (12, 4), 640, 4, start=16, stop=32)
    assert (part.key, part.numel) == ("in_proj[16:32]", 16)
    assert part.active({}) == 16
    assert part.active({"in_proj": 24}) == 8
    assert part.active({"in_proj": 24, "in_proj[16:32]": 3}) == 3
    assert part.forward_flops({"in_proj": 24, "in_proj[16:32]": 3}) == 120


def test_a_product_of_two_parameters_is_scaled_by_both():
    product = LayerCost("a", (2, 6), 96, 24, partner="b", partner_numel=8)
    assert product.forward_flops({}) == 96
    assert product.forward_flops({"a": 3}) == 24
    assert product.forward_flops({"b": 2}) == 24
    assert product.forward_flops({"a": 3, "b": 2}) == 6


@pytest.mark.parametrize("active", [-1, 1001])
def test_an_impossible_count_is_refused_by_name(active):
    with pytest.raises(ValueError, match=rf"fc\.weight: {active} active of 1000 connections"):
        forward_cost(TABLE, {"fc.weight": active})


def test_an_unknown_convention_is_refused_with_the_known_ones():
    check_convention("official")
    with pytest.raises(ValueError, match="'mac'; the known ones are 2mac, official"):
        check_convention("mac")


# ---------------------------------------------------------------------------------------- a training step


def test_the_backward_pass_of_the_paper_is_two_forward_passes():
    assert step_cost(10, 100, dense_gradient=False) == 30
    assert step_cost(10, 100, dense_gradient=True) == 120


def test_what_autograd_runs_is_scaled_but_for_the_dense_gradient():
    counts = {"conv.weight": 24, "fc.weight": 100}  # a half, a tenth
    apart = 64 + 128  # without a parameter
    assert actual_step_cost(TABLE) == apart + 2 * 2400 + 3 * 2000
    assert actual_step_cost(TABLE, counts) == apart + 2 * 1200 + 3 * 200
    assert actual_step_cost(TABLE, counts, dense_gradient=True) == apart + 1200 + 2400 + 2 * 200 + 2000


def test_what_is_computed_again_is_part_of_what_autograd_runs_and_of_nothing_else():
    table = CostTable(
        (LayerCost("w", (10, 10), 200, 10, 200, 200, recompute=200),), 8, (), 16, other_recompute=8
    )
    assert forward_cost(table, {"w": 50}) == 108
    assert actual_step_cost(table, {"w": 50}) == 8 + 16 + 8 + 4 * 100


def test_a_frozen_layer_has_no_dense_gradient():
    table = CostTable((LayerCost("w", (10, 10), 200, 10, 200),))
    assert actual_step_cost(table, {"w": 50}, dense_gradient=True) == 200


def test_the_cost_of_a_sample_has_both_rules_at_the_same_counts():
    counts = {"fc.weight": 100}
    cost = sample_cost(TABLE, counts)
    assert (cost.forward, cost.forward_dense) == (forward_cost(TABLE, counts), forward_cost(TABLE))
    assert cost.extra == 1800
    assert cost.actual == actual_step_cost(TABLE, counts)
    assert cost.actual_extra == 1800
    official = sample_cost(TABLE, counts, "official")
    assert (official.forward - cost.forward, official.forward_dense - cost.forward_dense) == (110, 110)
    assert (official.actual, official.actual_update) == (cost.actual, cost.actual_update)


def test_the_parts_of_a_sample_add_up_to_it_but_for_what_has_no_parameter():
    counts = {"conv.weight": 24, "fc.weight": 100}
    parts = [sample_cost_of(TABLE, counts, {layer.name}) for layer in TABLE.layers]
    whole = sample_cost(TABLE, counts)
    assert sum(part.forward for part in parts) == whole.forward - 64
    assert sum(part.extra for part in parts) == whole.extra
    assert sum(part.actual_extra for part in parts) == whole.actual_extra


# ------------------------------------------------------------------------------------------------- a run

F_S, F_D = 10, 100
COST = SampleCost(F_S, F_D, actual=25, actual_update=85)


@pytest.mark.parametrize(
    ("gradient", "ordinary", "update"),
    [
        ("never", (3 * F_S, 25), (3 * F_S, 25)),
        ("at_updates", (3 * F_S, 25), (2 * F_S + F_D, 85)),
        ("every_step", (2 * F_S + F_D, 85), (2 * F_S + F_D, 85)),
    ],
)
def test_a_method_pays_for_the_dense_gradient_when_it_reads_it(gradient, ordinary, update):
    for updated, (train, actual) in [(False, ordinary), (True, update)]:
        run = EMPTY.after(7, COST, gradient=gradient, updated=updated)
        assert (run.train, run.train_actual, run.train_dense) == (7 * train, 7 * actual, 7 * 3 * F_D)


def test_an_update_reads_the_dense_gradient_of_its_whole_accumulation_window_and_no_other():
    run = EMPTY
    for batches, updated in [([4, 4], False), ([4, 4, 1], True), ([4, 4], False)]:
        for i, samples in enumerate(batches, start=1):
            last = i == len(batches)
            run = run.after(samples, COST, gradient="at_updates", updated=updated and last, stepped=last)
    assert run.train == 16 * 3 * F_S + 9 * (2 * F_S + F_D)
    assert run.train_actual == 16 * 25 + 9 * 85
    assert run.train_dense == 25 * 3 * F_D
    assert (run.pending, run.pending_actual) == (0, 0)


def test_an_open_window_remembers_what_an_update_at_its_end_would_cost_more():
    run = EMPTY.after(4, COST, gradient="at_updates", stepped=False)
    assert (run.train, run.train_actual) == (4 * 3 * F_S, 4 * 25)
    assert (run.pending, run.pending_actual) == (4 * 90, 4 * 60)


def test_batches_of_one_window_may_cost_differently():
    long = SampleCost(2 * F_S, 2 * F_D, 50, 170)
    run = EMPTY.after(4, COST, gradient="at_updates", stepped=False)
    run = run.after(4, long, gradient="at_updates", updated=True)
    assert run.train == 4 * 120 + 4 * 240
    assert run.train_actual == 4 * 85 + 4 * 170


def test_one_optimizer_of_several_pays_for_the_gradient_of_its_own_layers():
    part = SampleCost(5, 35, 10, 25)  # a third of the 90, a quarter of the 60
    run = EMPTY.after(4, COST, gradient="at_updates", stepped=False)
    run = run.after(4, COST, gradient="at_updates", updated=True, part=part)
    assert run.train == 8 * 3 * F_S + 8 * 30
    assert run.train_actual == 8 * 25 + 8 * 15


batches = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20)


@given(batches, st.sampled_from(["never", "at_updates", "every_step"]))
def test_a_run_is_the_sum_of_its_steps_in_any_order(steps, gradient):
    def run(steps):
        total = EMPTY
        for samples, updated in steps:
            total = total.after(samples, COST, gradient=gradient, updated=updated)
        return total

    assert run(steps) == run(steps[::-1])
    dense = sum(
        n for n, updated in steps if gradient == "every_step" or (updated and gradient == "at_updates")
    )
    samples = sum(n for n, _ in steps)
    assert run(steps).train == samples * 3 * F_S + dense * (F_D - F_S)
    assert run(steps).train_actual == samples * 25 + dense * 60


# -------------------------------------------------------------------------------------- tables on paper


def test_a_table_comes_back_from_its_state():
    layers = (FIRST, LayerCost("b", (3, 4), 24, 3, 1, 2, 3, 4, 8, "a[0:8]", 8))
    table = CostTable(layers, 3, ("aten.mul (fc.weight)",), 5, 7)
    state = json.loads(json.dumps(table.state_dict()))
    assert CostTable.from_state_dict(state) == table


@pytest.mark.parametrize("convention", ["2mac", "official"])
@pytest.mark.parametrize("other", [0, 5])
def test_printed_rows_add_up_to_the_printed_total(convention, other):
    table, counts = CostTable((FIRST, LAYER), other), {"conv.weight": 24, "fc.weight": 100}
    result = report(table, counts, RunCost(1, 2, 1), convention)
    printed = result.table()
    for column, total in [(3, result.forward), (4, result.forward_dense)]:
        cells = [int(row[column].replace(",", "")) for row in printed.rows]
        assert sum(cells) == int(printed.total[column].replace(",", "")) == total
    assert len(printed.rows) == len(table.layers) + bool(other)
    assert result.forward == forward_cost(table, counts, convention)
    assert printed.total[2] == "124"
    assert "FLOP = one multiply or one add" in str(result)
    assert convention in str(result)


def test_a_report_names_what_is_not_counted():
    assert "not counted: aten.mul (fc.weight)" in str(report(TABLE, {}, EMPTY))


def test_a_report_tells_the_three_totals_apart():
    result = report(TABLE, {}, RunCost(60, 300, 55))
    assert (result.train, result.train_dense, result.train_actual, result.train_ratio) == (60, 300, 55, 0.2)
    assert "60 of 300 FLOPs if dense (0.2000); really run: 55" in str(result)


def test_a_report_is_a_rich_table():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(report(CostTable((LAYER,)), {"fc.weight": 500}, RunCost(3, 6, 2)))
    assert "1,000" in console.export_text()
