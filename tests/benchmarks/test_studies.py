"""The studies of the benchmarks on tiny data: what they store, what they show, and what each run means."""

import io
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from lightning_rigl import Sparsifier, plan_flops

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the scripts find their neighbours

import cifar_study
import methods
import mnist_methods
import mnist_studies
import studies
import text_study
from studies import Column, Study

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def pretend(case, directory):
    _, sparsity, seed = case
    return {"score": 90 + seed - 10 * sparsity, "train_ratio": 1 - sparsity, "epochs": 2.0}


STUDY = Study(
    "small",
    "A small study",
    (("dense", 0.0, 0), ("set", 0.5, 0), ("set", 0.5, 1), ("set", 0.75, 0), ("rigl", 0.5, 0)),
    pretend,
    {"model": "none"},
    "Test accuracy in per cent",
    {("dense", 0.0): 98.5, ("set", 0.5): 88, ("rigl", 0.5): 89},
    "a paper",
    columns=(Column("epochs", "epochs", 1), Column("train_ratio", "training FLOPs", 2)),
)
MACHINE = {"cpu": "abacus", "cores": 2, "torch": "2", "lightning": "3"}


def content(cases=STUDY.cases[:4]):
    runs = [
        {"method": m, "sparsity": s, "seed": seed, "machine": 0, **pretend((m, s, seed), Path())}
        for m, s, seed in cases
    ]
    return {"command": "make it", "machines": [MACHINE], "settings": STUDY.settings, "runs": runs}


GOLDEN = """\
# A small study

Test accuracy in per cent: mean ± standard deviation (seeds).

| method | 0.5 | 0.75 | epochs at 0.5 | epochs at 0.75 | training FLOPs at 0.5 | training FLOPs at 0.75 |
|---|---|---|---|---|---|---|
| dense | 90.00 (1) [98.5] | 90.00 (1) [98.5] | 2.0 | 2.0 | 1.00 | 1.00 |
| set | 85.50 ± 0.71 (2) [88] | 82.50 (1) | 2.0 | 2.0 | 0.50 | 0.25 |
| rigl |  |  |  |  |  |  |

In brackets: a paper

Command: `make it`. Machine: abacus, 2 cores, torch 2, lightning 3. FLOPs: share of dense training.

- model: none
"""


def test_the_page_has_a_row_for_each_method_and_a_column_for_each_sparsity():
    assert studies.markdown(STUDY, content()) == GOLDEN


def test_a_gpu_is_named_on_the_page():
    on_a_gpu = content() | {"machines": [MACHINE | {"gpu": "X1"}]}
    assert "2 cores, X1, torch 2" in studies.markdown(STUDY, on_a_gpu)


def test_the_picture_has_a_line_for_each_method_and_the_dense_model_dashed():
    [axes] = studies.picture(replace(STUDY, shown=(80, 95)), content()).axes
    [dense] = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(dense.get_ydata()) == [90, 90]
    [drawn] = axes.containers  # rigl has no run yet
    assert drawn.get_label() == "set"
    assert list(drawn[0].get_ydata()) == [85.5, 82.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "0.75"]
    assert axes.get_ylim() == (80, 95)


def test_there_is_a_picture_before_the_first_run():
    assert studies.picture(STUDY, content(())).axes


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda workers, *rest: ThreadPoolExecutor(1))


def test_what_is_stored_is_not_trained_again(tmp_path, one_thread):
    seen = []

    def train(case, directory):
        seen.append(case)
        return pretend(case, directory)

    first = replace(STUDY, cases=STUDY.cases[:2], train=train)
    studies.run(first, tmp_path, tmp_path / "out", 1, "make it")
    studies.run(replace(STUDY, train=train), tmp_path, tmp_path / "out", 1, "make it")
    assert sorted(seen) == sorted(STUDY.cases)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.json", "small.md", "small.png"]
    stored = json.loads((tmp_path / "out" / "small.json").read_text())["runs"]
    assert [(r["method"], r["sparsity"], r["seed"]) for r in stored] == list(STUDY.cases)


def test_runs_of_another_machine_are_continued_and_each_says_where_it_was_made(tmp_path, one_thread, capsys):
    studies.run(replace(STUDY, cases=STUDY.cases[3:4]), tmp_path, tmp_path, 1, "make it")
    stored = json.loads((tmp_path / "small.json").read_text())
    stored["machines"] = [MACHINE]
    (tmp_path / "small.json").write_text(json.dumps(stored))
    capsys.readouterr()
    studies.run(replace(STUDY, cases=STUDY.cases[2:4]), tmp_path, tmp_path, 1, "make it")
    assert capsys.readouterr().out == "set 0.5 seed 1: 86, 2 runs\n"
    stored = json.loads((tmp_path / "small.json").read_text())
    assert [(run["seed"], run["machine"]) for run in stored["runs"]] == [(1, 1), (0, 0)]
    assert "Machine: abacus, 2 cores, torch 2, lightning 3; " in (tmp_path / "small.md").read_text()


def test_a_finished_study_is_shown_anew(tmp_path, one_thread):
    studies.run(STUDY, tmp_path, tmp_path, 1, "make it")
    (tmp_path / "small.png").unlink()
    studies.run(replace(STUDY, title="Another title"), tmp_path, tmp_path, 1, "make it")
    assert (tmp_path / "small.md").read_text().startswith("# Another title")
    assert (tmp_path / "small.png").is_file()


def test_runs_of_other_settings_are_refused(tmp_path, one_thread):
    studies.run(STUDY, tmp_path, tmp_path, 1, "make it")
    with pytest.raises(ValueError, match="other settings"):
        studies.run(replace(STUDY, settings={"model": "another"}), tmp_path, tmp_path, 1, "make it")


BUILT = [build() for build in (partial(make, seeds=3) for make, _ in methods.STUDIES.values())]
BUILT.append(cifar_study.study(3, "paper"))


@pytest.mark.parametrize("study", BUILT, ids=lambda study: study.name)
def test_the_stored_results_can_be_continued(study):
    path = RESULTS / f"{study.name}.json"
    if not path.is_file():
        pytest.skip("nothing is stored yet")
    stored = json.loads(path.read_text())
    assert stored["settings"] == dict(study.settings)
    assert {(r["method"], r["sparsity"], r["seed"]) for r in stored["runs"]} <= set(study.cases)


@pytest.mark.parametrize("study", BUILT, ids=lambda study: study.name)
def test_each_case_is_run_once_and_each_published_value_has_its_case(study):
    assert len(set(study.cases)) == len(study.cases)
    assert set(study.published) <= {case[:2] for case in study.cases}
    json.dumps(dict(study.settings))


def test_only_cifar_has_protocols(capsys):
    with pytest.raises(SystemExit):
        methods.main(["text", "--data-dir", ".", "--protocol", "paper"])
    assert "only cifar has protocols, not text" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.STUDIES)
def test_a_folder_without_the_data_is_refused_before_the_first_run(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        methods.main([name, "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")])
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 grey images, 3,000 characters, 300 coloured images."""
    path, draws = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = np.arange(300) % 10
    grey = (labels[:, None, None] * 25 + draws.integers(5, size=(300, 28, 28))).astype(np.uint8)
    np.savez(path / "mnist.npz", x_train=grey, y_train=labels, x_test=grey[:50], y_test=labels[:50])
    (path / "tinyshakespeare.txt").write_text("to be, or not to be\n" * 150, encoding="utf-8")
    files = [jpeg([25 * label, 90, 40]) for label in labels]
    ends = np.cumsum([0, *map(len, files)])
    half = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": ends, "labels": labels}
    np.savez(
        path / "cifar10_jpeg.npz", **{f"{part}_{k}": v for part in ("train", "test") for k, v in half.items()}
    )
    return path


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), tuple(colour)).save(file, "JPEG")
    return file.getvalue()


def test_a_run_of_all(folder):
    run = mnist_methods.train(("rigl", 0.9, 0), folder, epochs=2)
    assert run["active"] == 26621
    assert run["train_ratio"] == pytest.approx(run["forward_ratio"], rel=0.01)


def test_a_change_is_the_one_that_its_name_says(folder, monkeypatch):
    seen = {}

    class Looking(mnist_methods.RigLCallback):
        def on_train_start(self, trainer, module):
            super().on_train_start(trainer, module)
            seen["schedule"] = self.settings["schedule"]
            seen["deviation"] = module.net[1].weight.std().item()
            seen["least"] = min(images.min().item() for images, _ in trainer.train_dataloader)

    monkeypatch.setattr(mnist_methods, "RigLCallback", Looking)
    usual = 1 / (3 * 784) ** 0.5  # of PyTorch's initial weights
    for name, change in mnist_methods.CHANGES.items():
        mnist_methods.train_changed((f"set, {name}", 0.0, 0), folder, epochs=1)
        assert seen["schedule"] == (change.schedule or mnist_methods.UPDATES)
        assert (seen["least"] == 0) == change.black_is_zero
        assert seen["deviation"] == pytest.approx(usual * 6**0.5 if change.he else usual, rel=0.1)


def test_equal_flops_means_as_many_steps_as_the_dense_training_pays_for():
    assert mnist_studies.paid_for("dense", 0.0, 6000) == 6000
    assert mnist_studies.paid_for("static", 0.9, 6000) == 6000 * 266200 // 26621
    small = mnist_studies.widths_of("small-dense", 0.9)
    weights = 784 * small[0] + small[0] * small[1] + small[1] * 10
    assert mnist_studies.paid_for("small-dense", 0.9, 6000) == 6000 * 266200 // weights
    # RigL's updates need the dense gradient; gradual pruning begins dense
    assert 6000 < mnist_studies.paid_for("gradual", 0.9, 6000) < mnist_studies.paid_for("rigl", 0.9, 6000)
    assert mnist_studies.paid_for("rigl", 0.9, 6000) < mnist_studies.paid_for("static", 0.9, 6000)


@pytest.mark.parametrize("method", ["dense", "small-dense", "static", "set", "rigl", "gradual"])
def test_a_run_of_equal_flops_spends_the_budget(folder, method):
    run = mnist_studies.train_equally((method, 0.0 if method == "dense" else 0.9, 0), folder, 10, 200)
    assert 0.97 < run["train_ratio"] <= 1
    assert run["epochs"] == 10 if method == "dense" else run["epochs"] > 10


def test_no_run_of_equal_flops_is_longer_than_the_cap(folder):
    run = mnist_studies.train_equally(("static", 0.98, 0), folder, 1, 4)
    assert run["epochs"] == 4
    assert run["train_ratio"] < 0.1


def test_it_is_said_where_the_cap_binds():
    said = mnist_studies.lengths([("dense", 0.0, 0), ("static", 0.9, 0), ("static", 0.98, 0)])
    assert said == "dense: 10.0; static 0.9: 100.0; static 0.98: 200 (the cap binds: 499.8 are paid for)"


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_follows_the_length(folder):
    rates, digits = Rates(), mnist_studies.images(folder)
    module = mnist_studies.ShareDecay(mnist_studies.mlp(784))
    studies.new_trainer([rates], steps=8).fit(module, mnist_studies.batches(digits, 0))
    assert rates.seen == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


@pytest.mark.parametrize(("method", "active"), [("set", 2662), ("set-erk", 2664), ("snfsoriginal", 2662)])
def test_the_published_protocol_shares_alike_between_layers(folder, method, active):
    assert mnist_studies.train_as_published((method, 0.99, 0), folder, 1)["active"] == active


def test_the_published_protocol_updates_once_an_epoch_and_not_after_the_last():
    timetable = mnist_studies.EACH_EPOCH.resolve(60_000)
    due = [step for step in range(60_000) if timetable.due(step, last=step - 1)]
    assert due == [600 * epoch for epoch in range(1, 100)]
    assert timetable.fraction(0) == 0.5


@pytest.mark.parametrize("method", ["dense", *text_study.METHODS])
def test_a_run_of_text(folder, method):
    run = text_study.train((method, 0.0 if method == "dense" else 0.75, 0), folder, steps=2)
    assert 1 < run["score"] < 2 * math.log2(11)
    assert run["train_ratio"] == 1 if method == "dense" else run["train_ratio"] < 0.9


def test_the_score_of_text_is_in_bits(folder):
    class Even(torch.nn.Module):
        def forward(self, text):
            return torch.zeros(*text.shape, 8)

    reader, seen = text_study.Reader(Even()), {}
    reader.log = lambda name, value, batch_size: seen.update({name: float(value)})
    reader.test_step(torch.zeros(2, 5, dtype=torch.long), 0)
    assert seen == {"bits": pytest.approx(3)}


def test_what_is_predicted_is_the_following_character():
    class Successor(torch.nn.Module):
        def forward(self, text):
            return 100.0 * torch.nn.functional.one_hot(text + 1, 8)

    reader = text_study.Reader(Successor())
    assert reader.training_step(torch.arange(7).repeat(2, 1), 0) == pytest.approx(0)
    assert reader.training_step(torch.zeros(2, 7, dtype=torch.long), 0) == pytest.approx(100)


def test_windows_are_pieces_of_the_text_and_a_seed_decides_which():
    text = torch.arange(500)
    first, again, other = (list(text_study.Windows(text, 3, seed)) for seed in (1, 1, 2))
    assert len(first) == 3
    assert first[0].shape == (text_study.BATCH_SIZE, text_study.LENGTH + 1)
    assert all((window.diff() == 1).all() for batch in first for window in batch)
    assert {int(window[0]) % 2 for window in first[0]} == {0, 1}  # at any place
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], other[0])


def test_the_sparse_reader_keeps_its_embedding_dense_and_all_else_alike():
    counts = Sparsifier(text_study.CharGRU(65), 0.75, distribution=text_study.EVERYWHERE, seed=0).counts
    sizes = {name: p.numel() for name, p in text_study.CharGRU(65).named_parameters() if p.ndim > 1}
    assert set(sizes) - set(counts) == {"embedding.weight"}
    assert all(counts[name] == sizes[name] / 4 for name in counts)


def test_the_small_dense_reader_is_as_large_as_the_sparse_one():
    net = text_study.CharGRU(65)
    weights = {n: p.numel() for n, p in net.named_parameters() if p.ndim > 1 and n != "embedding.weight"}
    sparse = sum(p.numel() for p in net.parameters()) - 0.9 * sum(weights.values())
    small = sum(p.numel() for p in text_study.CharGRU(65, text_study.thin_hidden(65, 0.9)).parameters())
    assert small == pytest.approx(sparse, rel=0.02)


def test_images_are_decoded_in_order(folder):
    pictures = cifar_study.pictures(folder)
    assert pictures.train_images.shape == (300, 3, 32, 32)
    assert pictures.train_images.dtype == torch.uint8
    reds = pictures.train_images[:, 0].float().mean((1, 2))
    assert torch.allclose(reds, 25.0 * pictures.train_labels, atol=3)


def test_an_archive_that_lacks_an_array_is_refused(tmp_path):
    np.savez(tmp_path / "cifar10_jpeg.npz", train_jpeg=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks test_jpeg, test_labels, .* it holds train_jpeg"):
        cifar_study.file_in(tmp_path)


def test_an_augmented_image_is_a_window_of_the_bordered_one_or_its_mirror():
    images = torch.rand(200, 3, 8, 8)
    seen = cifar_study.augmented(images, torch.Generator().manual_seed(0))
    found = set()
    for image, result in zip(images.numpy(), seen.numpy(), strict=True):
        bordered = np.pad(image, [(0, 0), (4, 4), (4, 4)])
        matches = [
            (top, left, mirror)
            for top in range(9)
            for left in range(9)
            for mirror in (False, True)
            if np.array_equal(
                result, bordered[:, top : top + 8, left : left + 8][:, :, :: -1 if mirror else 1]
            )
        ]
        assert len(matches) == 1
        found |= set(matches)
    assert {mirror for *_, mirror in found} == {False, True}
    assert {top for top, *_ in found} == set(range(9)) == {left for _, left, _ in found}


def test_the_network_of_the_paper_has_its_weights_and_flops():
    sizes = [p.numel() for p in cifar_study.WideResNet(22, 2).parameters() if p.ndim > 1]
    assert (len(sizes), sum(sizes)) == (23, 1_076_912)
    plan = plan_flops(cifar_study.WideResNet(22, 2), (1, 3, 32, 32), convention="official")
    assert plan.cost.forward_dense == 315_877_898  # the count of the authors
    with pytest.raises(ValueError, match="6n \\+ 4"):
        cifar_study.WideResNet(12, 2)


def test_the_paper_protocol_has_the_steps_of_the_paper():
    total = 97_656
    assert [round(share * total) for share in cifar_study.DECAYS] == [30_000, 60_000, 90_000]
    pruning = cifar_study.schedule_of("gradual", cifar_study.PROTOCOLS["paper"]).resolve(total)
    assert (pruning.begin, pruning.end, pruning.every) == (20_000, 75_000, 1000)


@pytest.mark.parametrize("method", ["dense", *cifar_study.METHODS])
def test_a_run_of_cifar(folder, method):
    protocol = replace(cifar_study.PROTOCOLS["short"], epochs=2)
    run = cifar_study.train((method, 0.0 if method == "dense" else 0.9, 0), folder, protocol)
    assert run["active"] == (77_360 if method == "dense" else 7745)
    assert run["train_ratio"] == 1 if method == "dense" else run["train_ratio"] < 1


@pytest.mark.slow
def test_runs_are_processes_of_their_own(folder, tmp_path):
    train = partial(mnist_studies.train_equally, dense_epochs=1, most=2)
    study = replace(mnist_studies.equal_flops(1), cases=(("dense", 0.0, 0), ("rigl", 0.9, 0)), train=train)
    studies.run(study, folder, tmp_path, 2, "make it")
    assert "| rigl |" in (tmp_path / "methods_equal_flops.md").read_text()
