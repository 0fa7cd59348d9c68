"""Six networks, measured, against the golden file, which was made by hand from shapes and positions."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from lightning_rigl import ER, ERK, Uniform
from lightning_rigl.flops.closed_forms import rigl, snfs, static
from lightning_rigl.flops.formulas import RunCost, actual_step_cost, forward_cost, sample_cost, step_cost
from lightning_rigl.flops.measure import measure

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the networks are

from paper_costs import official_table
from paper_networks import CharLM, MobileNetV1, ResNet50, WideResNet22x2, lenet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())


class GPT2Block(nn.Module):
    """Attention over the whole square (causal masks do not count), and an MLP."""

    def __init__(self, width=768, heads=12):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).movedim((2, 1), (0, 3))
        x = x + self.proj(scaled_dot_product_attention(q, k, v, is_causal=True).movedim(1, 2).flatten(2))
        return x + self.out(gelu(self.fc(self.ln2(x))))


NETS = {
    "lenet_300_100": lenet,
    "resnet50": ResNet50,
    "mobilenet_v1": MobileNetV1,
    "wrn22_2": WideResNet22x2,
    "char_gru_T16": CharLM,
    "gpt2_block_S1024": GPT2Block,  # inside of a stack: its input requires a gradient
}
CASES = [
    pytest.param(net, case, id=f"{net}-{case['distribution']}-{case['sparsity']}")
    for net in NETS
    for case in GOLDEN[net]["cases"]
]
on_every_net = pytest.mark.parametrize("net", NETS)
on_every_case = pytest.mark.parametrize(("net", "case"), CASES)


@cache
def measured(net):
    with torch.device("meta"):
        whole_numbers = {"dtype": torch.long} if net == "char_gru_T16" else {}
        inputs = torch.zeros(GOLDEN[net]["input"], **whole_numbers, requires_grad=net.startswith("gpt2"))
        return measure(NETS[net](), inputs)


def paper_rule(net, counts=None):
    """Gates are no convolutions or linear layers: their outputs are not among those of the golden rule."""
    gates = {layer.name: 0 for layer in measured(net).layers if layer.name.startswith("gru.")}
    return forward_cost(official_table(measured(net), {}, outputs=gates), counts, "official")


def shapes_of(net):
    """What is made sparse, in module order."""
    return {name: tuple(GOLDEN[net]["params"][name]["shape"]) for name in GOLDEN[net]["maskable"]}


def counts_of(net, case):
    """The counts of the package; a layer without one is dense, outside the pool."""
    kinds = {
        "uniform": Uniform(dense_first=bool(GOLDEN[net]["dense_under_uniform"])),
        "er": ER(),
        "erk": ERK(),
    }
    return kinds[case["distribution"]].counts(shapes_of(net), case["sparsity"])


def test_the_golden_file_has_six_networks_and_47_cases():
    assert NETS.keys() == GOLDEN.keys() - {"_rules", "official_colab", "runs"}
    assert len(CASES) == 47


@on_every_net
def test_every_layer_is_measured_and_nothing_is_left_over(net):
    table, golden = measured(net), GOLDEN[net]
    rows = {layer.key: (layer.shape, layer.numel, layer.forward, layer.outputs) for layer in table.layers}
    assert rows == {
        name: (tuple(row["shape"]), row["numel"], row["fwd_flops"], row["positions"] * row["shape"][0])
        for name, row in golden["params"].items()
    }
    assert (table.other, table.unknown) == (golden["param_free_fwd_flops"], ())


@on_every_net
def test_the_dense_network(net):
    table, golden = measured(net), GOLDEN[net]
    assert forward_cost(table) == golden["fwd_dense_macs2"]
    assert paper_rule(net) == golden["fwd_dense_paper_rule"]
    assert static(forward_cost(table)) == golden["train_dense_paper"]
    assert actual_step_cost(table) == golden["train_dense_actual"]
    assert actual_step_cost(table, dense_gradient=True) == golden["train_dense_actual"]


@on_every_case
def test_counts(net, case):
    counts, sizes = counts_of(net, case), {n: GOLDEN[net]["params"][n]["numel"] for n in shapes_of(net)}
    filled = sizes | counts
    assert filled == case["nnz"]
    assert sum(filled.values()) == case["nnz_total"]
    assert [name for name in sorted(filled) if filled[name] == sizes[name]] == sorted(case["kept_dense"])
    # the golden densities are real numbers, and zeros are rounded down
    assert all(-1e-6 < filled[n] / sizes[n] - case["density"][n] < 1 / sizes[n] + 1e-6 for n in sizes)


@on_every_case
def test_the_sparse_forward_pass(net, case):
    table = measured(net)
    sparse, dense = forward_cost(table, case["nnz"]), forward_cost(table)
    assert sparse == forward_cost(table, counts_of(net, case)) == case["fwd_sparse_macs2_from_nnz"]
    connections = [layer.forward // layer.numel for layer in table.layers if layer.name in case["nnz"]]
    assert -1 <= sparse - case["fwd_sparse_macs2"] < sum(connections)  # that is at real densities
    ratios = {
        "ratio_macs2": sparse / dense,
        "ratio_macs2_from_nnz": sparse / dense,
        "ratio_paper_rule": paper_rule(net, case["nnz"]) / paper_rule(net),
    }
    assert ratios == pytest.approx({name: case[name] for name in ratios}, abs=1e-4)


@on_every_case
def test_a_training_step_by_the_products_that_autograd_runs(net, case):
    table = measured(net)
    assert actual_step_cost(table, case["nnz"]) == case["train_actual_from_nnz"]
    update = actual_step_cost(table, case["nnz"], dense_gradient=True)
    assert update == case["train_actual_update_step_from_nnz"]
    cost = sample_cost(table, case["nnz"])
    assert (cost.actual, cost.actual_update) == (case["train_actual_from_nnz"], update)


@on_every_case
def test_training_by_the_closed_forms(net, case):
    table = measured(net)
    sparse, dense = forward_cost(table, case["nnz"]), forward_cost(table)
    forms = {
        **dict.fromkeys(("static", "set", "snip"), static(sparse)),
        "snfs": snfs(sparse, dense),
        **{f"rigl_dt{every}": rigl(sparse, dense, every) for every in (50, 100, 1000)},
    }
    ratios = {method: float(step) / static(dense) for method, step in forms.items()}
    assert ratios == pytest.approx(case["train_ratio"], abs=1e-4)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["net"])
def test_a_whole_run(run):
    shapes = shapes_of(run["net"])
    cost = sample_cost(measured(run["net"]), ERK().counts(shapes, run["sparsity"]))
    assert (run["dist"], cost.forward, cost.forward_dense) == ("erk", run["fS_from_nnz"], run["fD"])
    total = RunCost()
    for step in range(run["steps"]):
        total = total.after(run["batch"], cost, gradient="at_updates", updated=step in run["updates"])
    assert total.train == run["paper_schedule_total"] == 10_437_126_784
    assert total.train_actual == run["actual_total"] == 8_041_606_784
    assert total.train_dense == run["steps"] * run["batch"] * static(run["fD"])
    mean = rigl(cost.forward, cost.forward_dense, run["dT"])
    assert float(run["steps"] * run["batch"] * mean) == pytest.approx(run["app_H_total"], abs=0.05)
    update = step_cost(cost.forward, cost.forward_dense, dense_gradient=True)
    ordinary = run["steps"] - len(run["updates"])
    assert total.train == run["batch"] * (ordinary * static(cost.forward) + len(run["updates"]) * update)
