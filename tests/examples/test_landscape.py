"""The loss-landscape example: curves by hand and on a toy loss, and the command with tiny settings."""

import json
import math
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the script finds its neighbours

import landscape
from landscape import barrier, bezier, loss_along, optimise, straight

TS = [i / 20 for i in range(21)]
LEFT, RIGHT = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])


def hill(weights, batch=None):
    """Height 1 at the origin, above a plain: the straight line from LEFT to RIGHT crosses its top."""
    return torch.exp(-4 * weights.square().sum())


def test_a_curve_begins_and_ends_at_its_end_points_and_has_the_middle_worked_out_by_hand():
    quadratic = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 0.0]])
    cubic = torch.tensor([[0.0, 8.0], [0.0, 0.0], [8.0, 0.0], [8.0, 8.0]])
    for points in (quadratic, cubic):
        assert torch.equal(bezier(points, 0.0), points[0])
        assert torch.equal(bezier(points, 1.0), points[-1])
    assert bezier(quadratic, 0.5).tolist() == [2.0, 2.0]  # 1/4, 1/2, 1/4 of the points
    assert bezier(cubic, 0.5).tolist() == [4.0, 2.0]  # 1/8, 3/8, 3/8, 1/8
    assert bezier(quadratic, 0.25).tolist() == [1.0, 1.5]  # 9/16, 6/16, 1/16


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_curve_is_the_repeated_interpolation_between_its_points(degree):
    points = torch.randn(degree + 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in TS:
        rest = points.numpy()
        while len(rest) > 1:  # de Casteljau
            rest = (1 - t) * rest[:-1] + t * rest[1:]
        assert bezier(points, t).tolist() == pytest.approx(rest[0].tolist(), abs=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_straight_curve_moves_at_a_constant_pace(degree):
    points = straight(torch.tensor([0.0, 6.0]), torch.tensor([12.0, 0.0]), degree)
    assert points.shape == (degree + 1, 2)
    for t in TS:
        assert bezier(points, t).tolist() == pytest.approx([12 * t, 6 - 6 * t], abs=1e-5)


def test_the_straight_line_over_the_hill_has_the_barrier_worked_out_by_hand():
    losses = loss_along(straight(LEFT, RIGHT, 1), TS, hill)
    assert losses == pytest.approx([math.exp(-4 * (2 * t - 1) ** 2) for t in TS])
    assert barrier(losses) == pytest.approx(1 - math.exp(-4))


def test_a_barrier_is_measured_from_the_higher_end_and_is_zero_on_a_way_down():
    assert barrier([1.0, 5.0, 3.0]) == 2
    assert barrier([3.0, 5.0, 1.0]) == 2
    assert barrier([3.0, 2.0, 1.0]) == barrier([1.0, 0.0, 3.0]) == 0


@pytest.mark.parametrize("degree", [2, 3])
def test_an_optimised_curve_goes_around_the_hill_and_keeps_its_ends(degree):
    points = straight(LEFT, RIGHT, degree)
    points[1:-1] += 0.01 * torch.tensor([0.0, 1.0, 0.0])  # on the ridge itself no side is better
    before = points.clone()
    found = optimise(points, torch.ones(3, dtype=torch.bool), hill, range(400), lr=0.02, seed=0)
    assert torch.equal(points, before)
    assert torch.equal(found[[0, -1]], points[[0, -1]])
    assert barrier(loss_along(points, TS, hill)) > 0.9
    assert barrier(loss_along(found, TS, hill)) < 0.1


def test_a_restricted_curve_never_leaves_its_subspace_and_cannot_go_around_a_hill_that_fills_it():
    points = straight(LEFT, RIGHT, 2)
    inside, seen = torch.tensor([True, False, False]), []

    def slope(weights, batch):
        """The hill on a slope that pulls every coordinate down; it keeps the points it was asked for."""
        seen.append(weights.detach())
        return hill(weights) + weights.sum()

    found = optimise(points, inside, slope, range(50), lr=0.02, seed=0)
    assert all(not weights[~inside].any() for weights in (*seen, *found))
    assert found[1, 0] != 0
    assert barrier(loss_along(found, TS, hill)) > 0.9
    free = optimise(points, torch.ones(3, dtype=torch.bool), slope, range(50), lr=0.02, seed=0)
    assert free[1, 1:].ne(0).all()


def test_the_same_seed_finds_the_same_curve_and_leaves_the_global_generator_alone():
    points, everything = straight(LEFT, RIGHT, 3) + 0.1, torch.ones(3, dtype=torch.bool)
    state = torch.get_rng_state()
    first, same, other = (optimise(points, everything, hill, range(9), 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_each_step_sees_its_own_batch():
    seen = []

    def loss(weights, batch):
        seen.append(batch)
        return weights.sum()

    optimise(straight(LEFT, RIGHT, 2), torch.ones(3, dtype=torch.bool), loss, "abc", 0.1, seed=0)
    assert seen == ["a", "b", "c"]


def test_the_loss_of_a_vector_is_that_of_the_network_which_holds_it():
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    inputs, labels = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    weights = parameters_to_vector(other.parameters()).detach()
    mine = parameters_to_vector(net.parameters()).detach()
    with torch.no_grad():
        found = landscape.loss_of(net)(weights, (inputs, labels))
        expected = cross_entropy(other(inputs), labels)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(parameters_to_vector(net.parameters()), mine)


@pytest.fixture(scope="module")
def bench():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(128, 1, 4, 4, generator=generator)
    return landscape.Bench((inputs, (9 * inputs.mean((1, 2, 3))).long()), sparsity=0.9, epochs=4, seed=0)


def test_both_solutions_have_the_same_size_and_are_zero_outside_their_masks(bench):
    with landscape.quiet():
        static, gradual = bench.train("static"), bench.train(landscape.Gradual())
        again, same = bench.train("rigl", start=static), bench.train("static", start=gradual)
    size = 16 * 300 + 300 * 100 + 100 * 10
    for found in (static, gradual, again):
        assert found.weights.shape == found.inside.shape == (size + 410,)
        assert not found.weights[~found.inside].any()
        counts = {name: int(mask.sum()) for name, mask in found.masks.items()}
        assert counts == {name: int(mask.sum()) for name, mask in static.masks.items()}
        assert int(found.inside.sum()) == sum(counts.values()) + 410  # biases are dense
        assert found.losses[-1] == pytest.approx(
            float(landscape.loss_of(bench.network().net)(found.weights, bench.data)), abs=1e-5
        )
    assert (static.inside != gradual.inside).any()
    assert (static.inside != again.inside).any()  # and the masks it began with are still those of static
    assert torch.equal(same.inside, gradual.inside)  # no new random masks


def test_training_on_begins_with_the_weights_of_the_start(bench, monkeypatch):
    with landscape.quiet():
        static = bench.train("static")
        monkeypatch.setattr(landscape.Trainer, "fit", lambda trainer, module, batches: kept.append(module))
        kept = []
        with pytest.raises(RuntimeError, match="there are no masks here"):  # as nothing was trained
            bench.train("rigl", start=static)
    assert torch.equal(parameters_to_vector(kept[0].net.parameters()), static.weights)


def test_the_paths_start_and_end_at_the_solutions_and_the_sparse_ones_stay_in_the_union(bench, monkeypatch):
    curves, real = [], landscape.loss_along
    monkeypatch.setattr(
        landscape, "loss_along", lambda points, *rest: curves.append(points) or real(points, *rest)
    )
    with landscape.quiet():
        static, gradual = bench.train("static"), bench.train(landscape.Gradual())
    rows = list(bench.paths(gradual, static, [2, 5]))
    paths = [(row["path"], row["steps"]) for row in rows]
    assert paths == [(landscape.LINE, 0), *((name, steps) for steps in (2, 5) for name in landscape.CURVES)]
    outside = ~(static.inside | gradual.inside)
    assert outside.any()
    for row, points in zip(rows, curves, strict=True):
        assert torch.equal(points[0], gradual.weights)
        assert torch.equal(points[-1], static.weights)
        assert row["losses"][0] == pytest.approx(gradual.losses[-1], abs=1e-5)
        assert row["losses"][-1] == pytest.approx(static.losses[-1], abs=1e-5)
        assert points[:, outside].any() == ("full" in row["path"])
        assert row["barrier"] == barrier(row["losses"])
        if row["path"] != landscape.LINE:
            moved = points[1] != straight(gradual.weights, static.weights, len(points) - 1)[1]
            assert moved[static.inside & ~gradual.inside].any()
            assert moved[gradual.inside & ~static.inside].any()
    for short, long in zip(curves[1:5], curves[5:], strict=True):  # of 2 and of 5 steps
        assert not torch.equal(short, long)


def test_the_command_prints_its_table_and_writes_its_files(tmp_path, capsys, monkeypatch):
    made, real = [], landscape.Bench.train

    def train(bench, method, start=None):
        made.append((method, start, real(bench, method, start)))
        return made[-1][-1]

    monkeypatch.setattr(landscape.Bench, "train", train)
    landscape.main(["--epochs=2", "--steps", "3", "1", "--sparsity=0.95", f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith(("straight", "quadratic", "cubic"))]
    assert [line.split()[-3] for line in lines] == ["0", *repeat("1", 4), *repeat("3", 4)]
    assert {path.name for path in tmp_path.iterdir()} == {"landscape.json", "landscape.png"}
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "landscape.json").read_text())
    assert (found["data"], found["sparsity"], found["epochs"]) == ("digits", 0.95, 2)
    assert str(tmp_path) not in json.dumps(found)
    for row, line in zip(found["paths"], lines, strict=True):
        assert line.split()[-2:] == [f"{row['barrier']:.3f}", f"{row['mean']:.3f}"]
    for losses in found["training_on"].values():
        assert len(losses) == 3
        assert losses[0] == pytest.approx(found["paths"][0]["losses"][-1], abs=1e-5)
    static = made[0][-1]
    starts = [("static", None), (landscape.Gradual(), None), ("static", static), ("rigl", static)]
    assert [method for method, *_ in made] == [method for method, _ in starts]
    assert all(start is expected for (_, start, _), (_, expected) in zip(made, starts, strict=True))
    assert list(found["training_on"]) == ["static", "rigl"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--epochs=0"], "--epochs and --steps must be at least 1, got 0"),
        (["--steps", "5", "0"], "must be at least 1"),
        (["--sparsity=1"], r"--sparsity must lie in \[0, 1\), got 1.0"),
        (["--data=mnist"], "name the folder that holds it with --data-dir"),
    ],
)
def test_what_cannot_be_is_refused(asked, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        landscape.main(asked)
    assert stopped.value.code == 2
    assert message.replace("\\", "") in capsys.readouterr().err
