"""The command line: every shipped configuration runs, and every way to say something is understood."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rigl import ERK, SET, RigLCallback, UpdateSchedule, cli

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SMALL = [
    "fit",
    "--model=examples.cli_model.DigitsMLP",
    "--data=examples.cli_model.DigitsData",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=25",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
]


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lightning-rigl"])
    monkeypatch.setenv("COLUMNS", "200")  # argparse wraps its help


@pytest.fixture
def made(monkeypatch):
    """The RigLCallbacks that the command line has made and used, in order."""
    callbacks = []
    original = RigLCallback.setup  # the constructor's signature is jsonargparse's to read

    def setup(self, *args, **kwargs):
        callbacks.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(RigLCallback, "setup", setup)
    return callbacks


def said(capsys, *args):
    """What the command line prints before it leaves."""
    with pytest.raises(SystemExit):
        cli.main(list(args))
    captured = capsys.readouterr()
    return captured.out + captured.err


def log_of(folder):
    (path,) = Path(folder).rglob("metrics.csv")
    merged = {}
    for row in csv.DictReader(path.open()):
        merged.update({key: float(value) for key, value in row.items() if value})
    return merged


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs(path, made, tmp_path):
    cli.main(["fit", "--config", str(path)])

    log = log_of(tmp_path / "outputs" / "cli" / path.stem)
    assert log["val_accuracy"] > 0.85
    if path.stem == "dense":
        assert not made
        assert log["flops/forward_ratio"] == log["flops/train_ratio"] == 1
        return
    (callback,) = made
    sparsifier = callback.sparsifier
    assert log["sparsity/density"] == pytest.approx(sparsifier.density)
    assert (sparsifier.updates > 3) == (path.stem != "static")
    assert all((p[~sparsifier.masks[n]] == 0).all() for n, p in sparsifier.parameters.items())
    assert 0 < log["flops/forward_ratio"] <= log["flops/train_ratio"] < 0.3


def test_the_configurations_are_the_ones_that_the_documentation_names():
    assert {path.stem for path in CONFIGS} >= {"rigl", "set", "static", "dense", "per_layer", "custom_parts"}


def test_the_values_of_a_configuration_reach_the_parts(made):
    cli.main(["fit", "--config", str(ROOT / "examples/configs/custom_parts.yaml"), "--trainer.max_steps=3"])
    settings = made[0].settings
    assert settings["distribution"] == ERK(power=0.5, fixed={r"^net\.4": 0.0})
    assert settings["schedule"] == UpdateSchedule(10, 0.5, "inverse_power", 0, 0.9)
    assert (settings["sparsity"], settings["seed"]) == (0.95, 7)
    assert made[0].masks["net.4.weight"].all()


def test_an_option_changes_one_value_of_a_configuration(made):
    options = ["--trainer.callbacks.sparsity=0.5", "--trainer.callbacks.schedule.every=50"]
    cli.main(["fit", "--config", str(ROOT / "examples/configs/rigl.yaml"), *options, "--trainer.max_steps=3"])
    assert made[0].settings["sparsity"] == 0.5
    assert made[0].settings["schedule"] == UpdateSchedule(every=50, drop_fraction=0.3, end=0.75)


def test_the_installed_command_runs_from_the_repository(tmp_path):
    command = Path(sys.executable).with_name("lightning-rigl")
    options = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.max_epochs=1"]
    done = subprocess.run(
        [command, "fit", "--config", "examples/configs/rigl.yaml", *options],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path)["sparsity/updates"] == 1


def test_the_printed_configuration_runs_again(capsys, made, tmp_path):
    appended = ["--trainer.callbacks+=RigLCallback", "--trainer.callbacks.distribution=ERK"]
    options = ["--trainer.callbacks.distribution.power=2", "--trainer.callbacks.schedule.every=7"]
    printed = said(capsys, *SMALL, *appended, *options, "--print_config")
    Path("again.yaml").write_text(printed)
    (entry,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_rigl.RigLCallback"
    assert entry["init_args"]["distribution"]["init_args"]["power"] == 2

    assert said(capsys, "fit", "--config=again.yaml", "--print_config") == printed
    cli.main(["fit", "--config=again.yaml"])
    assert made[-1].settings["distribution"] == ERK(power=2)
    assert made[-1].sparsifier.updates == 2  # at 7 and 14 of 25 steps, that is before 18


def test_the_saved_configuration_of_a_run_repeats_it(made):
    cli.main([*SMALL, "--seed_everything=3", "--trainer.callbacks+=RigLCallback"])
    (saved,) = Path().rglob("config.yaml")
    cli.main(["fit", f"--config={saved}"])
    first, second = (callback.masks for callback in made)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_help_comes_from_the_docstrings(capsys):
    text = " ".join(said(capsys, "fit", "--trainer.callbacks.help=RigLCallback").split())
    assert "Train a sparse network from the first step" in text
    assert "fraction of zeros over the sparse layers, in [0, 1)" in text
    assert "how the connections are shared between layers: erk, er, uniform" in text
    assert "lightning_rigl.ERK" in text  # among the known subclasses
    text = " ".join(said(capsys, "fit", "--trainer.callbacks.help=FLOPsCallback").split())
    assert "convention {2mac,official}" in text
    assert "counts two FLOPs per multiply-add" in text


def test_the_help_of_the_parts_comes_from_their_docstrings(capsys):
    callback = "--trainer.callbacks.help=RigLCallback"
    text = " ".join(said(capsys, "fit", callback, "--trainer.callbacks.distribution.help=ERK").split())
    assert "1 is ERK, 0 makes all densities equal" in text
    text = " ".join(said(capsys, "fit", callback, "--trainer.callbacks.schedule.help").split())
    assert "steps between updates, at least 1" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["sparsity=0.7", "schedule.every=10"], {"sparsity": 0.7, "schedule": UpdateSchedule(every=10)}),
        (["distribution=ERK", "distribution.power=2"], {"distribution": ERK(power=2)}),
        (["distribution=erk"], {"distribution": ERK()}),
        (["method=set"], {"method": SET()}),
        (["method=SET"], {"method": SET()}),
        (['sparsity={"net.0": 0.9, "net.2": 0.5}'], {"sparsity": {"net.0": 0.9, "net.2": 0.5}}),
        (["schedule.begin=1e1", "schedule.end=1e2"], {"schedule": UpdateSchedule(begin=10, end=100)}),
        (["schedule.end=1.0"], {"schedule": UpdateSchedule(end=1.0)}),
        (["schedule=null", "seed=5"], {"schedule": None, "seed": 5}),
        (["exclude+=net.0", "exclude+=net.2"], {"exclude": ["net.0", "net.2"]}),
        (['include=["net.[02]"]'], {"include": ["net.[02]"]}),
        (["init=magnitude"], {"init": "magnitude"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_constructor(options, expected, made):
    cli.main([*SMALL, "--trainer.callbacks+=RigLCallback", *(f"--trainer.callbacks.{o}" for o in options)])
    got = {name: made[0].settings[name] for name in expected}
    assert got == expected
    assert {name: type(value) for name, value in got.items()} == {n: type(v) for n, v in expected.items()}
    assert made[0].masks


def test_two_callbacks_are_appended_in_any_order(made):
    rigl = ["--trainer.callbacks+=RigLCallback", "--trainer.callbacks.schedule.every=10"]
    flops = ["--trainer.callbacks+=FLOPsCallback", "--trainer.callbacks.convention=official"]
    cli.main([*SMALL, *flops, *rigl])
    log = log_of(".")
    assert log["sparsity/updates"] == 1
    assert log["sparsity/density"] == pytest.approx(0.1, abs=1e-3)
    # 2 FLOPs for each of 5,021 connections and one for each of 410 outputs
    assert log["flops/forward"] == pytest.approx(2 * 5021 + 410, abs=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["method=rigle"],
            "method: unknown name 'rigle'; the known ones are ",
        ),
        (["method=rigle"], "did you mean 'rigl'?"),
        (["distribution=erkk"], "distribution: unknown name 'erkk'; the known ones are ends, er, erk, "),
        (["pattern=nm"], "pattern: unknown name 'nm'; the known ones are "),
        (["sparsity=90"], "must lie in [0, 1), got 90"),
        (["init=nowhere.ckpt"], "init='nowhere.ckpt' is no known name and no file"),
        (["schedule.every=0"], "a whole number of at least 1, got 0"),
        (["schedule.end=2.5"], "end=2.5 is neither a whole number of steps"),
        (["schedule.begin=9", "schedule.end=9"], "end=9 must come after begin=9"),
        (["schedule.decay=cosinus"], "'cosine', 'linear', 'inverse_power', 'constant'"),
        (
            ["distribution=uniform", 'sparsity={"net.0": 0.5}'],
            "the distribution Uniform",
        ),
        (["include=net.0"], "Expected a <class 'list'>"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_refused_with_the_message_of_the_constructor(options, message, capsys):
    options = [f"--trainer.callbacks.{option}" for option in options]
    with pytest.raises((SystemExit, ValueError)) as refusal:
        cli.main([*SMALL, "--trainer.callbacks+=RigLCallback", *options])
    assert message in " ".join(f"{capsys.readouterr().err} {refusal.value}".split())
    assert not list(Path().iterdir()), "nothing has started"


def test_a_class_of_the_users_own_is_found_in_the_current_directory(made):
    Path("my_methods_for_the_cli.py").write_text(
        "from lightning_rigl import RigL\n"
        "class Weakest(RigL):\n"
        "    def grow_score(self, layer):\n"
        "        return -layer.dense_grad().abs()\n"
    )
    options = ["method=my_methods_for_the_cli.Weakest", "schedule.every=10"]
    cli.main([*SMALL, "--trainer.callbacks+=RigLCallback", *(f"--trainer.callbacks.{o}" for o in options)])
    assert type(made[0].settings["method"]).__name__ == "Weakest"
    assert made[0].sparsifier.updates == 1


def test_without_jsonargparse_the_message_names_the_extra(tmp_path):
    """In an environment that has all but jsonargparse."""
    site = Path(torch.__file__).parent.parent
    for entry in site.iterdir():
        if not entry.name.startswith(("jsonargparse", "__editable__")) and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    done = subprocess.run(
        [sys.executable, "-S", "-c", "from lightning_rigl.cli import main; main(['fit'])"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'lightning-rigl[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
