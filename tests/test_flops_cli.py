"""``lightning-rigl flops``: tables of a model that nobody trains, as a table, CSV and JSON."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_rigl import cli

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "flops_golden.json").read_text())
RESNET = ["--model=examples.paper_networks:ResNet50", "--input=2,3,224,224"]
DIGITS = ["--model=examples.cli_model:DigitsMLP", "--input=32,64"]
CASE = next(c for c in GOLDEN["resnet50"]["cases"] if (c["distribution"], c["sparsity"]) == ("erk", 0.9))


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lightning-rigl"])
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def flops(capsys):
    """What ``lightning-rigl flops`` prints."""

    def run(*args):
        cli.main(["flops", *args])
        return capsys.readouterr().out

    return run


@pytest.fixture
def numbers(flops):
    """The numbers that it prints."""
    return lambda *args: json.loads(flops(*args, "--format=json"))


def test_the_table_of_resnet50_is_golden():
    """The installed command, as in the README."""
    options = ["--sparsity", "0.9", "--distribution", "erk", "--method", "rigl", "--every", "100"]
    done = subprocess.run(
        [Path(sys.executable).with_name("lightning-rigl"), "flops", *RESNET, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    first = lines["conv1.weight"]
    assert first[1:3] == ["64x3x7x7", f"{CASE['nnz']['conv1.weight']:,}"]
    total = lines["total"]
    assert total[1:] == ["2,550,353", "0.1000", "1,977,917,020", "8,178,368,512", "0.2418"]
    assert lines["rigl, every 100 steps"][-1] == "0.2443"
    assert [lines[method][-1] for method in ("static", "set", "snip", "snfs")] == ["0.2418"] * 3 + ["0.4946"]
    assert len([line for line in lines if line.endswith(".weight")]) == 54
    assert "13,605,244 bytes of 102,228,128 if dense" in done.stdout


def test_json_holds_the_golden_integers(numbers):
    read = numbers(*RESNET, "--distribution=erk")
    assert read["forward"] == CASE["fwd_sparse_macs2_from_nnz"]
    assert {row["name"]: row["active"] for row in read["layers"]} == CASE["nnz"]
    assert read["training_ratios"]["rigl"] == pytest.approx(CASE["train_ratio"]["rigl_dt100"], abs=1e-4)
    assert read["bytes_dense"] == 4 * 25_557_032


def test_csv_holds_the_golden_integers(flops):
    *rows, total = csv.DictReader(io.StringIO(flops(*RESNET, "--format", "csv")))
    assert {row["layer"]: int(row["active"]) for row in rows} == CASE["nnz"]
    shapes = {row["layer"]: [int(n) for n in row["shape"].split("x")] for row in rows}
    assert shapes == {name: row["shape"] for name, row in GOLDEN["resnet50"]["params"].items()}
    assert (
        sum(int(row["forward"]) for row in rows) == int(total["forward"]) == CASE["fwd_sparse_macs2_from_nnz"]
    )


def test_the_official_convention_and_the_published_sizes(numbers):
    read = numbers(*RESNET, "--convention=official", "--sparsity=0.8", "--distribution=uniform")
    assert read["forward_ratio"] == pytest.approx(0.2241, abs=1e-4)
    assert (round(read["bytes"] / 1e6, 3), round(read["bytes_dense"] / 1e6, 3)) == (23.729, 102.122)


def test_a_budget_gives_the_steps_and_the_table_names_them(flops, numbers):
    options = [*DIGITS, "--steps=1000", "--budget=1.0x", "--every=50", "--end=0.8"]
    read = numbers(*options)
    assert read["train"] <= read["budget"] == 1000 * 32 * 3 * 100_400 < 1.001 * read["train"]
    assert read["updates"] == (int(0.8 * read["steps"]) - 1) // 50
    assert f"RigL, {read['steps']:,} steps of 32 samples, {read['updates']} updates" in flops(*options)
    assert f"the most within {read['budget']:,} FLOPs" in flops(*options)


def test_a_number_of_steps_gives_the_cost_of_the_run(numbers):
    read = numbers(*DIGITS, "--steps=100", "--every=10", "--end=55", "--method=rigl")
    sparse, dense = read["forward"], read["forward_dense"]
    assert read["updates"] == 5
    assert read["train"] == 32 * (95 * 3 * sparse + 5 * (2 * sparse + dense))
    assert read["train_dense"] == 3200 * 3 * dense
    assert 0 < read["train_actual"] < read["train"]
    assert numbers(*DIGITS, "--steps=100", "--method=static")["train"] == 3200 * 3 * sparse


@pytest.mark.parametrize("target", ["inference", "training"])
@pytest.mark.parametrize("distribution", ["erk", "er", "Uniform"])
def test_the_planner_finds_the_sparsity(target, distribution, numbers):
    read = numbers(*RESNET, "--target-ratio=0.25", f"--target={target}", f"--distribution={distribution}")
    ratio = read["forward_ratio"] if target == "inference" else read["training_ratios"]["rigl"]
    assert ratio == pytest.approx(0.25, abs=1e-5)
    assert ratio <= 0.25


@pytest.mark.parametrize(
    ("options", "distribution"),
    [
        (["--distribution=er"], "ER()"),
        (["--distribution=ERK", "--distribution.power=2"], "ERK(power=2.0, fixed=None)"),
        (["--distribution=Uniform", "--distribution.dense_first=false"], "Uniform(dense_first=False)"),
        (["--distribution=PerLayer", '--distribution.sparsities={"net.2": 0.5}'], "PerLayer("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_parts_are_named_as_elsewhere(options, distribution, numbers):
    assert numbers(*DIGITS, *options)["distribution"].startswith(distribution)


def test_patterns_and_inputs_are_repeated(numbers):
    flat = ["--distribution=Uniform", "--distribution.dense_first=false"]
    read = numbers(*DIGITS, *flat, "--include=net.[02]", "--include=net.4", "--exclude", "net.0")
    dense = {row["name"]: row["active"] == row["total"] for row in read["layers"]}
    assert dense == {"net.0.weight": True, "net.2.weight": False, "net.4.weight": False}
    Path("my_models_for_the_cli.py").write_text(
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.words, self.image = nn.Embedding(9, 4), nn.Linear(5, 4)\n"
        "    def forward(self, words, image):\n"
        "        return self.words(words).mean(1) + self.image(image)\n"
    )
    inputs = ["--input", "8,3:int64", "--input", "8,5"]
    read = numbers("--model=my_models_for_the_cli:Two", *inputs, "--distribution=er")
    assert [(row["name"], row["forward_dense"]) for row in read["layers"]] == [("image.weight", 40)]


def test_the_options_come_from_a_file_too(capsys, numbers):
    options = [*DIGITS, "--sparsity=0.5", "--exclude=net.0", "--distribution=ERK", "--distribution.power=2"]
    with pytest.raises(SystemExit):
        cli.main(["flops", *options, "--print_config"])
    printed = capsys.readouterr().out
    Path("flops.yaml").write_text(printed)
    assert yaml.safe_load(printed)["input"] == ["32,64"]
    assert numbers("--config=flops.yaml") == numbers(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*DIGITS, "--sparsity=1"], "must lie in [0, 1), got 1"),
        ([*DIGITS, "--sparsity=0.5", "--target-ratio=0.5"], "--target-ratio finds the sparsity"),
        ([*DIGITS, "--target-ratio=1.5"], "cannot be reached with ERK"),
        ([*DIGITS, "--target=memory"], "'inference', 'training'"),
        ([*DIGITS, "--budget=1.0x"], "whose length is unknown; give its steps"),
        ([*DIGITS, "--budget=5"], "the first step of 32 samples costs"),
        ([*DIGITS, "--budget=much"], "a multiple of the dense training such as '1.0x'"),
        ([*DIGITS, "--every=0"], "at least 1, got 0"),
        ([*DIGITS, "--end=2.5"], "end=2.5 is neither a whole number of steps"),
        ([*DIGITS, "--method=rigle"], "did you mean 'rigl'?"),
        ([*DIGITS, "--distribution=erkk"], "the known ones are ends, er, erk, "),
        ([*DIGITS, "--exclude=nets"], "'nets' matches no layer; near misses"),
        ([*DIGITS, "--convention=macs"], "'2mac', 'official'"),
        ([*DIGITS, "--format=xml"], "'table', 'csv', 'json'"),
        ([DIGITS[0]], "the following arguments are required: input"),
        ([DIGITS[0], "--input=32x64"], "expected sizes, the batch first"),
        ([DIGITS[0], "--input=64"], "expected sizes, the batch first"),
        ([DIGITS[0], "--input=0,64"], "expected sizes, the batch first"),
        ([DIGITS[0], "--input=32,64:int63"], "a dtype of torch"),
        ([DIGITS[0], "--input=32,64:nn"], "a dtype of torch"),
        ([DIGITS[0], "--input=32,65"], "DigitsMLP cannot be measured with (32, 65) float32"),
        ([*DIGITS, "--target=training"], "--target says which FLOPs --target-ratio is of"),
        (["--model=examples.cli_model:failing", DIGITS[1]], "RuntimeError when called: no such weights"),
        (["--model=examples.cli_model", DIGITS[1]], "expected pkg.module:factory"),
        (["--model=examples.nowhere:DigitsMLP", DIGITS[1]], "No module named 'examples.nowhere'"),
        (["--model=examples.cli_model:Nothing", DIGITS[1]], "has no attribute 'Nothing'"),
        (["--model=examples.networks:mlp", DIGITS[1]], "missing a required argument: 'pixels'"),
        (
            ["--model=examples.cli_model:DigitsData", DIGITS[1]],
            "made a DigitsData, expected a torch.nn.Module",
        ),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_words(options, message, capsys, monkeypatch):
    def fail():
        raise RuntimeError("no such weights")

    monkeypatch.setattr("examples.cli_model.failing", fail, raising=False)
    with pytest.raises(SystemExit) as refusal:
        cli.main(["flops", *options])
    assert refusal.value.code != 0
    assert message in " ".join(f"{capsys.readouterr().err} {refusal.value}".split())


def test_the_other_commands_know_of_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "{fit,validate,test,predict}" in text
    assert "lightning-rigl flops --help" in text
