"""Bad input is refused in words, before anything is written or the next round begins."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_rigl import RigLCallback
from tests.callbacks.problems import small
from tests.tickets.problems import Net, Seeds, Trainers, loader, tickets


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds: a whole number of at least 1, got 0"),
        ({"rounds": 2.0}, "rounds: .*got 2.0"),
        ({"save_every": 0}, "save_every: a whole number"),
        ({"prune": 0.0}, r"prune: the share that a round removes, a number in \(0, 1\), got 0.0"),
        ({"prune": 1}, "prune: .*got 1"),
        ({"prune": float("nan")}, "prune: .*got nan"),
        ({"prune": "0.2"}, "prune: .*got '0.2'"),
        ({"include": "net.3"}, "include: expected a list of regular expressions, got the string 'net.3'"),
        ({"exclude": "net.3"}, "exclude: expected a list of regular expressions, got the string 'net.3'"),
        ({"exclude": 5}, "exclude: expected a list of regular expressions, got 5"),
        ({"include": ["("]}, r"include: '\(' is no regular expression"),
        ({"include": [1]}, "include: 1 is no regular expression"),
        ({"rewind": "step"}, "rewind: 'init', 'learning_rate', a step .*got 'step'"),
        ({"rewind": -1}, "rewind: .*got -1"),
        ({"rewind": True}, "rewind: .*got True"),
        ({"rewind": 1.0}, "rewind: .*got 1.0"),
        ({"rewind": None}, "rewind: .*got None"),
    ],
    ids=str,
)
def test_values(settings, words):
    with pytest.raises(ValueError, match=words):
        tickets(**settings)
    assert not Path("tickets").exists()


def test_a_number_of_numpy_and_a_tuple_are_what_they_mean():
    """In a second call as in the first one."""
    settings = {"prune": np.float64(0.25), "exclude": (r"net\.3",)}
    assert [t.active for t in tickets(rounds=1, **settings).run(loader())] == [384, 288]
    assert [t.active for t in tickets(rounds=2, **settings).run(loader())] == [384, 288, 216]
    assert len(tickets(rounds=2, exclude=[r"net\.3"]).run(loader())) == 3


def test_a_file_is_no_folder():
    Path("taken").touch()
    with pytest.raises(ValueError, match="folder='taken' is a file; give the name of a folder"):
        tickets("taken")


def test_what_makes_modules_and_trainers():
    with pytest.raises(TypeError, match=r"model: a function or class that makes the module.*got Net"):
        tickets(model=Net())
    with pytest.raises(TypeError, match="trainer: a function that makes a Trainer"):
        tickets(trainer=pl.Trainer(logger=False, accelerator="cpu"))
    with pytest.raises(TypeError, match="model: must return a LightningModule, got Linear"):
        tickets(model=lambda: nn.Linear(2, 2)).run(loader())
    with pytest.raises(TypeError, match=r"trainer: must return a lightning.pytorch.Trainer, got NoneType"):
        tickets(trainer=lambda callbacks: None).run(loader())
    assert not Path("tickets").exists()


@pytest.mark.parametrize("given", ["none", "the first"])
def test_a_trainer_without_the_callbacks_of_the_round(given):
    def trainer(callbacks):
        return Trainers()(callbacks[:1] if given == "the first" else [])

    with pytest.raises(ValueError, match=r"does not have the callbacks.*trainer=lambda callbacks"):
        tickets(trainer=trainer).run(loader())
    assert not Path("tickets").exists()


class Unlucky(Net):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"path": Path("data")})


class Metric(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.2)
        lower = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lower, "monitor": "loss"}}


@pytest.mark.parametrize(
    ("model", "settings", "rewind", "words"),
    [
        (None, {"fast_dev_run": True}, "init", "fast_dev_run: a trial would leave its tickets"),
        (None, {"enable_checkpointing": False}, "init", "leave enable_checkpointing as it is"),
        (None, {}, 0.05, "rewind=0.05: training has 12 steps, and this share of them is none"),
        (Metric, {}, "init", "ReduceLROnPlateau follows a metric.*would lose that step; take a scheduler"),
        (None, {}, 12, "rewind=12: training has 12 steps, and nothing would be left"),
        (
            None,
            {"max_epochs": -1, "max_time": "00:00:00:01"},
            0.5,
            r"rewind=0.5.*nobody knows; give a step",
        ),
        (Unlucky, {}, "init", "the checkpoint of Unlucky cannot be loaded again.*plain types"),
    ],
    ids=[
        "trial",
        "no checkpoints",
        "less than a step",
        "metric",
        "step after the end",
        "unknown length",
        "hyperparameters",
    ],
)
def test_trainings_that_tickets_cannot_be_made_of(model, settings, rewind, words):
    with pytest.raises(MisconfigurationException, match=words):
        tickets(model=model, trainer=Trainers(**settings), rewind=rewind).run(loader())
    assert not [path for path in Path("tickets").rglob("*") if path.is_file()]


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}], ids=str)
def test_nothing_to_train(settings):
    with pytest.raises(RuntimeError, match="round 0 has not been trained: is there something to train"):
        tickets(trainer=Trainers(**settings)).run(loader())
    assert not Path("tickets").exists()


def test_a_scheduler_that_only_names_a_metric_or_is_stepped_by_hand():
    class Named(Net):
        def configure_optimizers(self):
            given = super().configure_optimizers()
            return {**given, "lr_scheduler": {**given["lr_scheduler"], "monitor": "loss"}}

    class ByHand(Metric):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            given = super().configure_optimizers()
            return {**given, "lr_scheduler": given["lr_scheduler"]["scheduler"]}

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()
            self.lr_schedulers().step(loss.detach())

    for model in (Named, ByHand):
        assert len(tickets(model.__name__, model=model, rounds=1).run(loader())) == 2


def test_averaged_weights():
    with pytest.raises(MisconfigurationException, match="WeightAveraging trains other weights"):
        tickets(trainer=Trainers(EMAWeightAveraging())).run(loader())
    assert not Path("tickets").exists()


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="exclude"):
        tickets(exclude=["head"]).run(loader())
    assert not Path("tickets").exists()


class Pairs(Net):
    """Two optimizer steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_a_step_that_no_batch_ends_with():
    assert [t.steps for t in tickets("even", model=Pairs, rewind=14, rounds=1).run(loader())] == [24, 10]
    words = "no batch ends after exactly 3 optimizer steps, the next one ends after 4"
    with pytest.raises(MisconfigurationException, match=words):
        tickets(model=Pairs, rewind=3).run(loader())
    with pytest.raises(MisconfigurationException, match="optimizer steps nobody knows"):
        tickets("fraction", model=Pairs, rewind=0.5).run(loader())


class Early(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        trainer.should_stop = trainer.global_step == 3


def test_a_training_that_ends_before_step_k():
    early = Trainers(Early(), max_epochs=-1, max_steps=12)
    with pytest.raises(
        MisconfigurationException, match="training ended after 3 optimizer steps, before step 5"
    ):
        tickets(trainer=early, rewind=5).run(loader())
    assert not tickets(rewind=5).tickets


class TestAFolderOfAnotherRun:
    @pytest.fixture(autouse=True)
    def _first(self):
        tickets(rounds=1).run(loader())

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"prune": 0.2}, r"holds tickets of prune=0\.25, and this call has prune=0\.2"),
            ({"rewind": 5}, "rewind='init', and this call has rewind=5"),
            ({"rewind": "learning_rate"}, "take another folder"),
            ({"exclude": [r"net\.3"]}, "exclude=None, and this call has exclude="),
            ({"include": [r"net\.3"]}, "include=None"),
        ],
        ids=str,
    )
    def test_settings(self, settings, words):
        seeds = Seeds()
        with pytest.raises(ValueError, match=words):
            tickets(model=seeds, **settings).run(loader())
        assert not seeds.made

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (Seeds(hidden=20), r"another model: net\.0\.weight is \[20, 16\] now.*has it as \[24, 16\]"),
            (small, r"another model: net\.2\.weight is \[4, 24\] now.*has it as"),
        ],
        ids=["width", "layers"],
    )
    def test_a_model(self, model, words):
        before = sorted(Path("tickets").rglob("*"))
        with pytest.raises(ValueError, match="another model"):
            tickets(model=model).run(loader())
        assert {path.name for path in set(Path("tickets").rglob("*")) - set(before)} <= {
            "round-02",
            "masks.pt",
        }

    def test_a_model_with_less(self):
        class Less(Net):
            def __init__(self):
                super().__init__()
                self.net[1] = nn.Identity()

        with pytest.raises(ValueError, match=r"another model, which has net\.1\.weight; this one has not"):
            tickets(model=Less).run(loader())

    @pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_steps": 10}, {"limit_train_batches": 3}])
    def test_another_length(self, length):
        words = "holds tickets of length=12, and this call has length=.*the same length"
        with pytest.raises(ValueError, match=words):
            tickets(trainer=Trainers(**length)).run(loader())
        assert len(tickets().tickets) == 2
        assert len(tickets(trainer=Trainers(max_epochs=-1, max_steps=12)).run(loader())) == 3

    @pytest.mark.parametrize("file", ["tickets.json", "round-01/end.json"])
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ('{"format": 1, "pru', "Unterminated string"),
            ("[1, 2]", "no names and values"),
            ("{}", "(format|active) is missing"),
        ],
    )
    def test_files_of_something_else(self, file, content, words):
        Path("tickets", file).write_text(content)
        with pytest.raises(ValueError, match=rf"{file}' is not what .*\({words}.*take another folder"):
            tickets().run(loader())

    def test_a_later_format(self, monkeypatch):
        monkeypatch.setattr("lightning_rigl.tickets.folder.FORMAT", 2)
        with pytest.raises(ValueError, match="holds tickets of format=1, and this call has format=2"):
            tickets().run(loader())


def test_a_lost_file_of_step_k():
    """Later rounds would begin with the initialisation otherwise."""
    tickets(rounds=1, rewind=5).run(loader())
    Path("tickets", "rewind.ckpt").rename("aside")
    with pytest.raises(ValueError, match=r"rewind\.ckpt' is missing, and this round begins with it"):
        tickets(rewind=5).run(loader())
    Path("aside").rename(Path("tickets", "rewind.ckpt"))
    assert [t.steps for t in tickets(rewind=5).run(loader())] == [12, 7, 7]


def test_a_layer_that_would_be_empty():
    """The rounds before it stay, and so does what the table says of them."""

    class Small(Net):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[3].weight.mul_(1e-6)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    imp = tickets(model=Small, prune=0.15, rounds=5)
    with pytest.raises(ValueError, match=r"net\.3\.weight would have no connection left of 24"):
        imp.run(loader())
    assert [t.active for t in imp.tickets] == [480, 408]
    assert "408 of 480" in str(imp.summary())


def test_a_callback_of_its_own_would_change_the_masks():
    with pytest.raises(RuntimeError, match="RigLCallback"):
        tickets(trainer=Trainers(RigLCallback(0.5))).run(loader())
    assert not Path("tickets").exists()
