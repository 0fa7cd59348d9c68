"""f_S and f_D -> the mean cost of a training step by appendix H, against the golden tables and the paper."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rigl.flops.closed_forms import (
    gradual_pruning,
    mean_step,
    rigl,
    snfs,
    static,
    training_ratios,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())
NETS = [name for name, net in GOLDEN.items() if isinstance(net, dict) and "cases" in net]
CASES = [(net, case) for net in NETS for case in GOLDEN[net]["cases"]]
OFFICIAL = GOLDEN["official_colab"]["resnet50"]

costs = st.integers(0, 10**12).flatmap(lambda dense: st.tuples(st.integers(0, dense), st.just(dense)))


@pytest.mark.parametrize(
    ("net", "case"), CASES, ids=[f"{n}-{c['distribution']}-{c['sparsity']}" for n, c in CASES]
)
def test_the_ratios_are_golden(net, case):
    sparse, dense = case["fwd_sparse_macs2_from_nnz"], GOLDEN[net]["fwd_dense_macs2"]
    for name, expected in case["train_ratio"].items():
        if name.startswith("rigl_dt"):
            ratio = training_ratios(sparse, dense, every=int(name.removeprefix("rigl_dt")))["rigl"]
        else:
            ratio = training_ratios(sparse, dense)[name]
        assert ratio == pytest.approx(expected, abs=1e-4), name


def test_every_golden_case_is_there():
    assert len(CASES) == 47


@pytest.mark.parametrize("sparsity", OFFICIAL["ratio"])
def test_the_ratios_of_the_official_notebook_for_resnet50(sparsity):
    """Published to two digits: .23 .23 .61 .56 at 80 %."""
    golden, dense = OFFICIAL["ratio"][sparsity], OFFICIAL["fwd_dense"]
    uniform, erk = (training_ratios(round(golden[d] * dense), dense) for d in ("uniform", "ERK"))
    expected = golden["train"]
    for ours, theirs in [("static", "static"), ("rigl", "rigl"), ("snfs", "snfs"), ("snip", "snip")]:
        assert uniform[ours] == pytest.approx(expected[theirs], abs=1e-4)
    assert uniform["gradual_pruning"] == pytest.approx(expected["pruning"], abs=1e-4)
    for method in ("static", "rigl", "snfs"):
        assert erk[method] == pytest.approx(expected[f"{method}(ERK)"], abs=1e-4)


def test_a_whole_run_by_the_closed_form_is_golden():
    (run,) = GOLDEN["runs"]
    total = run["steps"] * run["batch"] * rigl(run["fS_from_nnz"], run["fD"], run["dT"])
    assert float(total) == pytest.approx(run["app_H_total"], abs=0.05)


def test_the_forms_are_exact_beyond_what_floats_hold():
    sparse, dense = 2**70 + 1, 2**80 + 3
    assert static(sparse) == 3 * sparse
    assert snfs(sparse, dense) == 2 * sparse + dense
    assert rigl(sparse, dense, 100) == Fraction(302 * sparse + dense, 101)
    assert rigl(sparse, dense, 1) == Fraction(5 * sparse + dense, 2)


def test_gradual_pruning_by_hand():
    """Moments 0 to 4, of which 0 is dense, 1 is half way to the end and 2, 3, 4 have the final sparsity."""
    still_dense = Fraction(1 + Fraction(1, 8), 5)
    assert gradual_pruning(10, 100, total=4, begin=0, end=2, every=1) == 3 * (10 + 90 * still_dense)


def test_gradual_pruning_depends_on_the_proportions_of_its_schedule_only():
    assert gradual_pruning(7, 90) == gradual_pruning(7, 90, total=3200, begin=1000, end=2500, every=100)


@pytest.mark.parametrize(
    "schedule",
    [{"begin": 5, "end": 5}, {"begin": -1}, {"end": 40_000}, {"every": 0}],
    ids=str,
)
def test_an_impossible_pruning_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match="gradual pruning needs 0 <= begin < end <= total"):
        gradual_pruning(10, 100, **schedule)


def test_an_update_at_no_distance_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rigl(10, 100, every=0)


@given(costs, st.integers(1, 10_000))
def test_who_reads_more_dense_gradients_pays_more(cost, every):
    sparse, dense = cost
    ratios = training_ratios(sparse, dense, every)
    assert ratios["static"] <= ratios["rigl"] <= ratios["snfs"] <= ratios["dense"] == 1
    assert ratios["static"] <= ratios["gradual_pruning"] <= 1
    assert rigl(sparse, dense, every) - static(sparse) == Fraction(dense - sparse, every + 1)


@given(costs, st.integers(1, 10_000))
def test_the_form_of_a_method_follows_from_when_it_reads_the_dense_gradient(cost, every):
    assert mean_step(*cost, "never", every) == static(cost[0])
    assert mean_step(*cost, "at_updates", every) == rigl(*cost, every)
    assert mean_step(*cost, "every_step", every) == snfs(*cost)


def test_a_model_without_products_costs_what_the_dense_one_costs():
    assert set(training_ratios(0, 0).values()) == {1.0}
