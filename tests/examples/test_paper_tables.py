"""The tables of published FLOPs: every number that differs from ours is marked, and its note says why."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the script finds its neighbours

import paper_numbers
import paper_shares
import paper_tables
from paper_numbers import Published
from paper_shares import Network

NETWORKS = ("resnet50", "mobilenet_v1", "mobilenet_v2", "wrn22x2", "char_lm")
PRINTED = {
    "resnet50": paper_numbers.RESNET50,
    "mobilenet_v1": paper_numbers.MOBILENET_V1,
    "wrn22x2": paper_numbers.WRN22X2,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return getattr(paper_shares, request.param)()


def pairs(network):
    """Our number and the printed one, of each cell of a table."""
    for row in paper_tables.rows(network):
        yield from zip((row.inference, row.training), row.published, strict=True)
    costs = (network.dense, 3 * network.dense * network.samples)
    yield from zip(costs, network.dense_published, strict=True)


def test_what_differs_has_a_note_and_every_note_is_needed(network):
    letters = {printed.partition(" ")[2] for _, printed in pairs(network)} - {""}
    assert letters == {letter for letter in network.notes if len(letter) == 1}
    unexplained = [printed for ours, printed in pairs(network) if paper_tables.differs(ours, printed)]
    assert all(" " in printed for printed in unexplained)


def test_the_sparsities_and_systems_of_a_table(network):
    rows = list(paper_tables.rows(network))
    assert {row.sparsity for row in rows} >= {0.8, 0.9, 0.95, 0.965, 0.99}
    for sparsity in network.sparsities:
        assert {row.system for row in rows if row.sparsity == sparsity} >= set(network.shown)
    table = paper_tables.share_table(network)
    assert len(table.rows) == len(rows)
    assert str(table).count("≠") == sum(paper_tables.differs(*pair) for pair in pairs(network))


@pytest.mark.parametrize("name", PRINTED)
def test_every_published_number_is_in_a_row(name):
    rows = list(paper_tables.rows(getattr(paper_shares, name)()))
    shown = [(row.source, row.system, row.sparsity, row.published) for row in rows if row.source]
    assert sorted(shown) == sorted(
        (numbers.source, numbers.system, sparsity, printed)
        for numbers in PRINTED[name]
        for sparsity, printed in numbers.shares.items()
    )


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        # .10 and .52 of figure 2, table 4, and one cell of the README
        ("resnet50", {("Fig. 2", "a"): 8, ("Table 4", "d"): 14, ("Table 4", "e"): 2, ("README", "f"): 1}),
        ("mobilenet_v1", {("Fig. 3", "a"): 3}),
        ("wrn22x2", {("report", x): n for x, n in {"a": 7, "b": 1, "c": 3, "d": 4}.items()}),
    ],
)
def test_what_differs_is_known(name, marked):
    found = {}
    for row in paper_tables.rows(getattr(paper_shares, name)()):
        for ours, printed in zip((row.inference, row.training), row.published, strict=True):
            if paper_tables.differs(ours, printed):
                key = row.source, printed.partition(" ")[2]
                found[key] = found.get(key, 0) + 1
    assert found == marked


@pytest.mark.parametrize(
    ("ours", "printed", "other"),
    [
        (0.2254, ".23", False),
        (0.2254, ".22", True),
        (1.1396, "1.14", False),
        (0.1285, ".10 a", True),
        (0.5603, ".56 c", False),
        (8_202_340_776, "8.2e9", False),
        (946_380_288, "9.45e8 e", True),
        (3_225_291_630_575_616_000, "3.2e18", False),
        (0.1, "", False),
    ],
)
def test_numbers_are_compared_to_as_many_digits_as_were_printed(ours, printed, other):
    assert paper_tables.differs(ours, printed) is other
    assert ("≠" in paper_tables.beside(ours, printed)) is other
    assert printed.split(" ")[0] in paper_tables.beside(ours, printed)


@pytest.mark.parametrize(
    ("name", "base", "times"),
    [("RigL", "RigL", 1), ("RigL 5x (ERK)", "RigL (ERK)", 5), ("Pruning 1.5x", "Pruning", 1.5)],
)
def test_a_longer_training_is_the_same_system(name, base, times):
    assert paper_tables.split(name) == (base, times)


def test_a_longer_training_costs_its_multiple_and_inference_the_same():
    network = Network(
        "small", 100, {"RigL": lambda sparsity: (10, 36)}, (), [Published("here", "RigL 5x", {0.9: ("", "")})]
    )
    (row,) = paper_tables.rows(network)
    assert (row.inference, row.training) == (0.1, 5 * 36 / 300)


def test_a_system_that_nobody_computes_is_an_error():
    network = Network("small", 100, {}, (), [Published("here", "Magic", {0.9: (".1", ".1")})])
    with pytest.raises(KeyError, match="Magic"):
        list(paper_tables.rows(network))


def check(printed):
    titles = ("ResNet-50", "MobileNet-v1", "MobileNet-v2", "WRN-22-2", "GRU over characters", "LeNet")
    assert all(title in printed for title in titles)
    for notes in (paper_numbers.RESNET50_NOTES, paper_numbers.WRN22X2_NOTES):
        assert all(f"{letter}  {text}" in printed for letter, text in notes.items())
    assert "equal: 23 of 23" in printed
    assert "8.202e9" in printed
    assert max(len(line) for line in printed.splitlines() if "≠" in line) <= 80


def test_the_script_prints_all_tables_and_notes():
    done = subprocess.run(
        [sys.executable, paper_tables.__file__], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_it_does_so_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    paper_tables.main()
    printed = capsys.readouterr().out
    check(printed)
    assert "─" not in printed
