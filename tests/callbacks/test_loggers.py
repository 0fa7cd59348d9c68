"""What reaches each logger: values at the step they belong to, settings once; and a run without any."""

import csv
import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from tests.callbacks.problems import Small, data, small, trainer

SCHEDULE = UpdateSchedule(every=6, end=0.75, drop_fraction=0.5)
SPARSITY = ("sparsity/density", "sparsity/drop_fraction", "sparsity/updates")
FLOPS = ("flops/forward", "flops/forward_ratio", "flops/train", "flops/train_ratio")
SETTINGS = {  # as text: a logger may keep all hyperparameters as text
    "sparsity/sparsity": "0.8",
    "sparsity/method": "RigL()",
    "sparsity/distribution": "ERK(power=1.0, fixed=None)",
    "sparsity/schedule": str(SCHEDULE),
    "sparsity/pattern": "Unstructured()",
    "sparsity/include": "None",
    "sparsity/exclude": "None",
    "sparsity/init": "random",
    "sparsity/seed": "3",
    "sparsity/growth": "None",
    "sparsity/rescale": "None",
    "sparsity/compute": "dense",
    "sparsity/end": "30",
}


class CSV:
    """Each of these makes a logger, and reads back name -> [(step, value), ...] and the hyperparameters."""

    def make(self, folder, monkeypatch):
        return CSVLogger(folder)

    def scalars(self, logger):
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = list(csv.DictReader(file))
        return {
            name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in (*SPARSITY, *FLOPS)
        }

    def settings(self, logger):
        with open(f"{logger.log_dir}/hparams.yaml") as file:
            return yaml.safe_load(file)


class TensorBoard(CSV):
    def make(self, folder, monkeypatch):
        pytest.importorskip("tensorboard")
        return TensorBoardLogger(folder)

    def scalars(self, logger):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(logger.log_dir, {"scalars": 0}).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in (*SPARSITY, *FLOPS)}


class MLFlow:
    def make(self, folder, monkeypatch):
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        return MLFlowLogger(tracking_uri=f"file:{folder}")

    def scalars(self, logger):
        history = logger.experiment.get_metric_history
        return {
            name: [(m.step, m.value) for m in history(logger.run_id, name)] for name in (*SPARSITY, *FLOPS)
        }

    def settings(self, logger):
        return logger.experiment.get_run(logger.run_id).data.params


class WeightsAndBiases:
    def make(self, folder, monkeypatch):
        pytest.importorskip("wandb", minversion="0.31")  # its `leet inspect --json` reads offline runs
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("WANDB_SILENT", "true")
        return WandbLogger(save_dir=folder, mode="offline")

    def records(self, logger):
        logger.experiment.finish()
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", f"{logger.save_dir}/wandb"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return [json.loads(line) for line in lines.splitlines()]

    def scalars(self, logger):
        rows = [record["history"]["item"] for record in self.records(logger) if record["type"] == "history"]
        return {
            name: [(row["trainer/global_step"], row[name]) for row in rows if name in row]
            for name in (*SPARSITY, *FLOPS)
        }

    def settings(self, logger):
        records = [record for record in self.records(logger) if record["type"] == "config"]
        return {name: value for record in records for name, value in record["config"]["update"].items()}


LOGGERS = pytest.mark.parametrize(
    "kind", [CSV(), TensorBoard(), MLFlow(), WeightsAndBiases()], ids=lambda kind: type(kind).__name__
)


class Truth(pl.Callback):
    """What is true after each batch that stepped: x-axis of Lightning -> name -> value."""

    def __init__(self, rigl, flops):
        self.rigl, self.flops, self.at, self.updates = rigl, flops, {}, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        sparsifier, report = self.rigl.sparsifier, self.flops.report()
        active = sum(int(mask.sum()) for mask in self.rigl.masks.values())
        fraction = sparsifier.drop_fraction
        values = (active / 480, fraction, sparsifier.updates, report.forward, report.forward_ratio)
        true = dict(zip((*SPARSITY, *FLOPS), (*values, report.train, report.train_ratio), strict=True))
        self.at.setdefault(
            trainer.global_step - 1, true
        )  # of batches that are accumulated, the one that steps
        if sparsifier.updates > len(self.updates):
            self.updates.append(trainer.global_step - 1)


def run(logger, *callbacks, module=None, **arguments):
    rigl, flops = RigLCallback(0.8, schedule=SCHEDULE, seed=3), FLOPsCallback()
    truth = Truth(rigl, flops)
    fit = trainer(rigl, flops, truth, *callbacks, logger=logger, **{"log_every_n_steps": 10, **arguments})
    fit.fit(small() if module is None else module, data())
    return fit, truth


def check(scalars, truth, steps):
    """All values of a run: at these steps and no others, and true at each."""
    for name, points in scalars.items():
        assert {step for step, _ in points} == steps, name
        for step, value in points:
            assert value == pytest.approx(truth.at[step][name], rel=1e-6), (name, step)  # float32 somewhere


FLUSHES = {9, 19, 29, 39}
EPOCHS = {7, 15, 23, 31, 39}


@LOGGERS
def test_updates_come_at_their_own_step_and_levels_at_the_rhythm_of_the_trainer(kind, tmp_path, monkeypatch):
    logger = kind.make(tmp_path, monkeypatch)
    _, truth = run(logger)
    scalars = kind.scalars(logger)
    assert truth.updates == [6, 12, 18, 24]
    check(scalars, truth, {*truth.updates} | FLUSHES | EPOCHS)
    settings = kind.settings(logger)
    assert {name: str(settings[name]) for name in SETTINGS} == SETTINGS


@LOGGERS
def test_a_second_fit_goes_on_in_the_same_logger(kind, tmp_path, monkeypatch):
    """The end in steps is another one then; a logger that keeps the first value does not stop the run."""
    logger, module = kind.make(tmp_path, monkeypatch), small()
    fit, truth = run(logger, module=module, max_epochs=2)
    fit.fit_loop.max_epochs = 5
    fit.fit(module, data())
    assert truth.updates == [6, 18, 24]
    check(kind.scalars(logger), truth, {*truth.updates} | FLUSHES | EPOCHS)


@pytest.mark.parametrize("every", [1, 4, 50])
def test_batches_that_are_accumulated_are_one_step(every, tmp_path):
    """The x-axis counts the batches that stepped."""
    logger = CSVLogger(tmp_path)
    _, truth = run(logger, accumulate_grad_batches=2, log_every_n_steps=every, max_epochs=10)
    assert truth.updates == [6, 12, 18, 24]
    flushes = range(every - 1, 40, every)
    check(CSV().scalars(logger), truth, {*truth.updates, *flushes, *range(3, 40, 4)})


@pytest.mark.parametrize("step", [11, 12, 13])
def test_the_last_values_of_a_run_that_stops_early_are_true(step, tmp_path):
    """Lightning hands over once more what was logged last, when a callback stops the training."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == step + 1

    logger = CSVLogger(tmp_path)
    _, truth = run(logger, Stop())
    check(CSV().scalars(logger), truth, {6, 7, 9, step} | ({12} if step >= 12 else set()))


def test_two_loggers_have_the_same(tmp_path, monkeypatch):
    first, second = CSVLogger(tmp_path / "csv"), TensorBoard().make(tmp_path / "tb", monkeypatch)
    run([first, second])
    ours, theirs = CSV().scalars(first), TensorBoard().scalars(second)
    for name in ours:
        for (step, value), (other, same) in zip(ours[name], theirs[name], strict=True):
            assert (step, value) == (other, pytest.approx(same, rel=1e-6))


def test_the_settings_of_the_module_are_kept_beside_ours(tmp_path):
    class Settled(Small):
        def __init__(self, width=24):
            super().__init__()
            self.save_hyperparameters()

    logger = TensorBoardLogger(tmp_path)
    run(logger, module=Settled())
    settings = TensorBoard().settings(logger)
    assert settings["width"] == 24
    assert settings["sparsity/end"] == 30


def test_the_hparams_tab_of_tensorboard_has_the_settings(tmp_path, monkeypatch):
    logger = TensorBoard().make(tmp_path, monkeypatch)
    run(logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    summary = EventAccumulator(logger.log_dir).Reload().SummaryMetadata("_hparams_/session_start_info")
    tab = HParamsPluginData.FromString(summary.plugin_data.content).session_start_info.hparams
    assert tab.keys() == SETTINGS.keys()
    assert tab["sparsity/end"].number_value == 30


@pytest.mark.parametrize("logger", [False, None, []])
def test_a_run_without_a_logger_is_the_same_run(logger, tmp_path):
    """What a checkpoint callback monitors is there all the same; ``None`` is the Trainer's own choice."""
    keep = ModelCheckpoint(tmp_path, monitor="sparsity/updates", mode="max")
    fit, truth = run(logger, keep, enable_checkpointing=True, default_root_dir=tmp_path)
    _, other = run(CSVLogger(tmp_path))
    assert truth.at == other.at
    assert float(keep.best_model_score) == 4
    assert {*SPARSITY, *FLOPS} <= fit.callback_metrics.keys()
    assert float(fit.callback_metrics["flops/train"]) == truth.at[39]["flops/train"]
