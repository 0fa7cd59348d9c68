"""The demo, its data and its pictures; and the MNIST benchmark, which is built from them."""

import csv
import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_rigl.plots import accuracy_against_flops, input_connections

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # where the script finds its neighbours

import data
import digits

ROOT = Path(__file__).parents[2]
IMAGES, LABELS = np.arange(24, dtype=np.uint8).reshape(4, 2, 3), np.array([3, 1, 4, 1], dtype=np.uint8)
FILES = {
    "train-images-idx3-ubyte": IMAGES,
    "train-labels-idx1-ubyte": LABELS,
    "t10k-images-idx3-ubyte": IMAGES[:2],
    "t10k-labels-idx1-ubyte": LABELS[:2],
}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    digits.main(["--seeds=1", "--epochs=2", "--sparsities", "0.9", "--workers=1", f"--output={folder}"])
    rows = read_rows(folder / "summary.csv")
    return folder, {(row["model"], row["system"]): row for row in rows}


def test_the_demo_writes_its_files(demo):
    folder, summary = demo
    names = {"results.csv", "summary.csv", "accuracy_against_flops.png", "input_connections.png"}
    assert {path.name for path in folder.iterdir()} == names
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    systems = ("dense", "small-dense", "static", "set", "rigl")
    assert set(summary) == {(model, system) for model in ("mlp", "cnn") for system in systems}
    assert len(read_rows(folder / "results.csv")) == 10


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_ratios_of_the_demo_are_those_of_the_systems(demo, model):
    summary = {s: row for (m, s), row in demo[1].items() if m == model}
    forward = {system: float(row["forward_ratio"]) for system, row in summary.items()}
    train = {system: float(row["train_ratio"]) for system, row in summary.items()}
    assert forward["dense"] == train["dense"] == 1
    assert forward["static"] == forward["set"] == forward["rigl"] < 0.2
    assert train["static"] == train["set"] == forward["static"] < train["rigl"] < 1
    assert train["small-dense"] == forward["small-dense"] < 0.2
    sizes = {s: int(row["weights"]) + int(row["always_dense"]) for s, row in summary.items()}
    assert sizes["small-dense"] == pytest.approx(sizes["rigl"], rel=0.05)
    assert int(summary["rigl"]["weights"]) == pytest.approx(0.1 * int(summary["dense"]["weights"]), rel=0.01)


def test_the_demo_prints_a_row_per_system_and_where_its_files_are(capsys, tmp_path):
    small = ["--seeds=2", "--epochs=1", "--workers=1", f"--output={tmp_path}"]
    digits.main([*small, "--models", "mlp", "--methods", "static", "--sparsities", "0.95"])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "±" in line]
    dense, static = ([row for row in rows if row[:1] == [name]] for name in ("dense", "static"))
    assert len(dense) == len(static) == 1
    assert static[0][1] == "0.95"
    assert "mlp 300-100 (seeds: 2)" in shown
    assert "results.csv" in shown.replace("\n", " ")
    assert not (tmp_path / "input_connections.png").exists(), "RigL did not run"


def test_the_demo_runs_as_a_script_with_several_workers(tmp_path):
    script = [sys.executable, str(ROOT / "examples" / "digits.py"), "--models", "mlp", "--methods", "rigl"]
    settings = ["--sparsities", "0.9", "--seeds=1", "--epochs=1", "--workers=2", "--output", str(tmp_path)]
    done = subprocess.run([*script, *settings], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["system"] for row in read_rows(tmp_path / "results.csv")] == ["dense", "rigl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data=mnist"], "--data-dir"),
        (["--data=mnist", "--data-dir=nowhere"], "nowhere: there is no such folder"),
        (["--data=mnist", "--data-dir=."], "train-images-idx3-ubyte"),
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--sparsities", "1.5"], "1.5"),
    ],
)
def test_bad_input_is_answered_in_words(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        digits.main(arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_as_torchvision_stores_it(tmp_path, packed):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in FILES.items():
        content = idx(array)
        (raw / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    check_mnist(data.load("mnist", tmp_path))


def test_mnist_is_read_as_keras_stores_it(tmp_path):
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mnist.npz", **dict(zip(names, FILES.values(), strict=True)))
    check_mnist(data.load("mnist", tmp_path))


def check_mnist(found):
    assert torch.equal(found.train_images * 255, torch.from_numpy(IMAGES).float().unsqueeze(1))
    assert found.train_labels.tolist() == [3, 1, 4, 1]
    assert found.test_images.shape == (2, 1, 2, 3)
    assert found.test_labels.tolist() == [3, 1]


def test_files_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"no digits")
    with pytest.raises(ValueError, match="not an IDX file"):
        data.read_idx(tmp_path / "text")
    (tmp_path / "short").write_bytes(idx(IMAGES)[:-1])
    with pytest.raises(ValueError, match=r"23 values where its header announces \(4, 2, 3\)"):
        data.read_idx(tmp_path / "short")
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES)
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test"):
        data.load("mnist", tmp_path)


def test_batches_in_order_hold_every_image_once():
    batches = data.Batches(torch.arange(10), torch.arange(10), 4)
    assert [images.tolist() for images, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


def test_shuffled_batches_are_full_differ_between_epochs_and_repeat_by_seed():
    batches = data.Batches(torch.arange(10), torch.arange(10), 4, seed=1)
    epochs = [torch.cat([images for images, _ in batches]).tolist() for _ in range(2)]
    assert len(batches) == 2
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = data.Batches(torch.arange(10), torch.arange(10), 4, seed=1)
    assert torch.cat([images for images, _ in again]).tolist() == epochs[0]


def test_standardised_images_have_unit_deviation_and_black_stays_black_unless_centred():
    plain = data.load("digits")
    scaled, centred = plain.standardised(centred=False), plain.standardised()
    for found in (scaled, centred):
        assert found.train_images.std().item() == pytest.approx(1, abs=1e-5)
    assert centred.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(scaled.train_images == 0, plain.train_images == 0)


def test_input_connections_are_counted_per_pixel():
    before, after = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    before[:2], after[:, 4] = True, True
    figure = input_connections(before, after, torch.rand(2, 3))
    shown = [axes.images[0].get_array().tolist() for axes in figure.axes[:2]]
    assert shown == [[[2, 2, 2], [2, 2, 2]], [[0, 0, 0], [0, 4, 0]]]
    with pytest.raises(ValueError, match=r"\(4, 6\) before and \(6, 4\) after"):
        input_connections(before, after.T, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 2\), but the layer has 6 inputs"):
        input_connections(before, after, torch.rand(2, 2))


def test_accuracy_against_flops_draws_every_row_and_names_what_a_row_lacks():
    row = {"model": "mlp", "system": "rigl", "sparsity": 0.9, "accuracy": 97.0, "spread": 0.5, "train": 3e9}
    rows = [row, {**row, "sparsity": 0.98, "train": 1e9}, {**row, "model": "cnn"}]
    figure = accuracy_against_flops(rows)
    assert [axes.get_title() for axes in figure.axes] == ["mlp", "cnn"]
    line = figure.axes[0].lines[0]
    assert line.get_label() == "rigl"
    assert line.get_xdata().tolist() == [1e9, 3e9]
    with pytest.raises(ValueError, match="row 1 lacks spread"):
        accuracy_against_flops([row, {key: value for key, value in row.items() if key != "spread"}])
    with pytest.raises(ValueError, match="no rows"):
        accuracy_against_flops([])


def test_without_matplotlib_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rigl\[plot\]'"):
        input_connections(mask, mask, torch.rand(2, 2))
