"""The comparison with other packages: what it wants to find, and the table it makes of what it measured."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the script finds its neighbours

import against_others


def pretend_installed(folder, **versions):
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(against_others, "store", lambda *content: pytest.fail("nothing was measured"))
    return tmp_path / "others"


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({}, "rigl-torch 0.5.2 is asked for and none is there"),
        ({"rigl_torch": "0.5.2"}, "sparsimony 0.1.0 is asked for and none is there"),
        ({"rigl_torch": "0.6.0", "sparsimony": "0.1.0"}, "rigl-torch 0.5.2 is asked for and 0.6.0 is there"),
    ],
)
def test_without_the_others_it_says_how_to_get_them(stored, installed, words):
    pretend_installed(stored, **installed)
    with pytest.raises(SystemExit) as refused:
        against_others.main(["--others", str(stored)])
    command = f"pip install --no-deps --target {stored} rigl-torch==0.5.2 sparsimony==0.1.0"
    assert str(refused.value) == f"{stored}: {words}; {command}"
    assert str(stored) not in sys.path


def test_without_a_folder_it_asks_for_one(capsys):
    with pytest.raises(SystemExit):
        against_others.main([])
    assert "--others" in capsys.readouterr().err


def test_an_unknown_part_is_refused_with_those_there_are(stored, capsys):
    with pytest.raises(SystemExit):
        against_others.main(["speed", "--others", str(stored)])
    assert "no part speed; there are masking, update, training" in capsys.readouterr().err


TABLE = """\
part                          our way                 rigl-torch    sparsimony        target
masking MLP                   native bits                  16.0x          9.5x           15x
training                      native                        5.2x          6.0x            5x
training                      native, ActiveSGD             7.0x          8.1x
training, with updates        native                        5.5x          6.2x            5x"""


def test_the_table_has_a_line_for_each_of_our_ways():
    found = {
        "masking MLP": {"calls_ms": {}, "ratio": {"native bits": {"rigl-torch": 16, "sparsimony": 9.52}}},
        "training": {
            "ratio": {
                "native": {"rigl-torch": 5.17, "sparsimony": 6.0},
                "native, ActiveSGD": {"rigl-torch": 7.0, "sparsimony": 8.1},
            },
            "ratio_with_updates": {"native": {"rigl-torch": 5.5, "sparsimony": 6.2}},
        },
    }
    assert against_others.table(found) == TABLE


def test_a_ratio_is_the_median_over_rounds_of_their_time_to_ours():
    times = {"rigl-torch": [10.0, 8.0, 9.0], "sparsimony": [4.0, 4.0, 4.0], "native": [1.0, 4.0, 3.0]}
    ours = {"native": times["native"]}
    assert against_others.ratios(times, ours) == {"native": {"rigl-torch": 3.0, "sparsimony": 1.33}}
    assert against_others.ratios(times, times) == against_others.ratios(times, ours)
