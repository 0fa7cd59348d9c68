"""The sanity checks of masks: each control changes one thing, and the command prints their table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the script finds its neighbours

import sanity_checks
from sanity_checks import Bench, Row

SCRIPT = Path(__file__).parents[2] / "examples" / "sanity_checks.py"
BENCH = Bench("digits", None, "mlp", 0.95, epochs=1)


def first_weights(seed):
    return {n: p.detach() for n, p in BENCH.network(seed).named_parameters() if p.ndim > 1}


def test_a_seed_decides_the_initial_weights():
    assert all(torch.equal(w, first_weights(3)[name]) for name, w in first_weights(3).items())
    assert not any(torch.equal(w, first_weights(4)[name]) for name, w in first_weights(3).items())


@pytest.mark.parametrize("method", ["gemminer", "rigl"])
def test_a_found_mask_has_the_budget(method):
    counts = sum(int(mask.sum()) for mask in BENCH.find(method, 0).values())
    size = sum(w.numel() for w in first_weights(0).values())
    assert counts == pytest.approx(0.05 * size, abs=6)


@pytest.mark.parametrize(("method", "shared"), [("gemminer", 0.05), ("snip", 0.01), ("rigl", 0.95)])
def test_an_inverted_search_finds_another_mask_with_the_same_budget(method, shared):
    masks, inverted = BENCH.find(method, 0), BENCH.find(method, 0, inverted=True)
    overlap = sum(int((mask & inverted[name]).sum()) for name, mask in masks.items())
    total = sum(int(mask.sum()) for mask in masks.values())
    assert total == sum(int(mask.sum()) for mask in inverted.values())
    assert overlap < shared * total


class Spy(Bench):
    """Trains nothing; notes what would be trained."""

    def find(self, method, seed, inverted=False):
        weights = first_weights(seed)
        return {name: (w < 0) if inverted else (w > 0.1) for name, w in weights.items()}

    def fine_tune(self, masks, seed, weights):
        self.seen.append((masks, seed, weights))
        return 50.0 + len(self.seen)


@pytest.fixture
def spy():
    bench = Spy("digits", None, "mlp", 0.95, 1)
    object.__setattr__(bench, "seen", [])
    return bench


def test_each_control_changes_one_thing(spy):
    rows = sanity_checks.check(("gemminer", 7), spy)
    assert [row.check for row in rows] == list(sanity_checks.CHECKS)
    assert [row.accuracy for row in rows] == [51, 52, 53, 54]
    (ticket, *_), (other, *_), (again, *_), (inverted, *_) = spy.seen
    for name, mask in ticket.items():
        assert torch.equal(again[name], mask)
        assert int(other[name].sum()) == int(mask.sum())
        assert not torch.equal(other[name], mask)
        assert not torch.equal(inverted[name], mask)
    assert [(seed, weights) for _, seed, weights in spy.seen] == [(7, 7), (7, 7), (7, 1007), (7, 7)]
    assert [row.check for row in sanity_checks.check(("rigl", 7), spy)] == list(sanity_checks.CHECKS)


def test_random_masks_of_smart_ratio_have_the_budget(spy):
    [row] = sanity_checks.check(("smart-ratio", 2), spy)
    assert (row.method, row.check, row.seed) == ("smart-ratio", "ticket", 2)
    masks = spy.seen[0][0]
    assert masks["net.5.weight"].float().mean() == pytest.approx(0.3, abs=1e-3)
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(0.05 * 50200, abs=3)


def test_a_mask_with_an_empty_layer_gives_one_answer_to_all():
    masks = {name: torch.ones_like(w).bool() for name, w in first_weights(0).items()}
    masks["net.3.weight"].zero_()
    labels = BENCH.digits.test_labels
    assert BENCH.fine_tune(masks, 0, 0) == pytest.approx(100 * max(labels.bincount().tolist()) / len(labels))


def test_the_table_has_means_and_deviations(capsys):
    rows = [Row("rigl", "ticket", 0, 90.0), Row("rigl", "ticket", 1, 94.0), Row("rigl", "shuffled", 0, 80.0)]
    sanity_checks.Console(width=120).print(sanity_checks.table("title", rows))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "rigl" in line]
    assert line.split() == ["rigl", "92.00", "±", "2.83", "80.00"]


def test_the_command_prints_its_table(capsys):
    sanity_checks.main(["--methods", "rigl", "smart-ratio", "--seeds=1", "--epochs=1", "--workers=1"])
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["mask", "ticket", "shuffled", "re-initialised", "inverted"] in lines
    assert len(next(line for line in lines if line[:1] == ["rigl"])) == 5
    assert len(next(line for line in lines if line[:1] == ["smart-ratio"])) == 2


def test_it_runs_as_a_script_with_several_workers(tmp_path):
    small = ["--methods", "smart-ratio", "--seeds=2", "--epochs=1", "--workers=2"]
    done = subprocess.run([sys.executable, str(SCRIPT), *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity=1"], "--sparsity must lie in [0, 1), got 1.0"),
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--data=mnist"], "--data-dir"),
    ],
)
def test_bad_input_is_answered_in_words(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        sanity_checks.main(arguments)
    assert words in capsys.readouterr().err
