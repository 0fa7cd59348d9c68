"""A budget: training stops with the last step that fits, or says how long a training would spend it."""

import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule, cli
from lightning_rigl.flops.planning import steps_for_budget
from tests.callbacks.flops_modules import Noisy
from tests.callbacks.flops_problems import F_D, GAN, Manual, Silent, batches, fit, rigl
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import StatefulLoader
from tests.callbacks.test_flops_measurement import Sequences

pytestmark = pytest.mark.filterwarnings(
    "ignore:RigLCallback. (training has|no topology update)",
    "ignore:.*callbacks used to create the checkpoint",
)
TOO_LONG = "cannot be spent"


def samples(number, batch_size=8, **settings):
    x = torch.randn(number, 16)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=batch_size, **settings)


class Spent(pl.Callback):
    """FLOPs after each optimizer step; place it behind the FLOPsCallback."""

    def on_train_start(self, trainer, module):
        self.after = {trainer.global_step: None}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        counter = next(c for c in trainer.callbacks if isinstance(c, FLOPsCallback))
        self.after.setdefault(trainer.global_step, counter.report().train)


def spent(budget=None, *callbacks, **arguments):
    """What each step of a run has cost, by the number of steps."""
    watch = Spent()
    fit(FLOPsCallback(budget=budget), watch, *callbacks, **{"max_epochs": 3, **arguments})
    return {step: cost for step, cost in watch.after.items() if cost is not None}


@pytest.mark.parametrize("lengths", [[4, 8, 12, 16] * 3, [16, 12, 8, 4] * 3])
def test_a_multiple_follows_batches_that_cost_differently(lengths):
    def steps(budget):
        counter, loader = FLOPsCallback(budget=budget), [torch.randn(2, n, 16) for n in lengths]
        return fit(counter, module=Sequences(), loader=DataLoader(loader, batch_size=None)).global_step

    assert steps("1.0x") == 12
    assert steps("0.5x") == 6


@pytest.mark.parametrize(
    "budget", ["x", "", "abc", "-1x", "0x", -1, 0, 0.5, True, float("nan"), float("inf")]
)
def test_what_is_no_budget_is_refused_in_words(budget):
    with pytest.raises(ValueError, match=r"^budget: a .*multiple of the dense training such as '1.0x'"):
        FLOPsCallback(budget=budget)


@pytest.mark.parametrize("budget", ["1x", "0.5x", ".5x", "1.0X", 1e9, 7, "1e9"])
def test_multiples_and_numbers_are_budgets(budget):
    FLOPsCallback(budget=budget)


class TestTheLastStepIsTheLastThatFits:
    @pytest.mark.parametrize("method", ["rigl", "set"])
    @pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 9}])
    def test_at_every_step(self, method, settings):
        """Among them updates (every third step) and the shorter window at the end of an epoch."""
        settings = {"sizes": [8] * 5, "max_epochs": 2 if not settings else 4, **settings}
        costs = spent(None, rigl(every=3, method=method), **settings)
        assert len(costs) == {1: 10, 2: 12, 9: 4}[settings.get("accumulate_grad_batches", 1)]
        for steps in list(costs)[1:-1]:
            for budget in (costs[steps], costs[steps + 1] - 1):
                stopped = spent(budget, rigl(every=3, method=method), **settings)
                assert stopped == {step: cost for step, cost in costs.items() if step <= steps}

    def test_with_windows_that_grow(self):
        settings = {"sizes": [8] * 6, "max_epochs": 3}
        costs = spent(None, GradientAccumulationScheduler({0: 1, 1: 3}), **settings)
        assert len(costs) == 6 + 2 + 2
        for steps in (5, 6, 7):
            stopped = spent(costs[steps + 1] - 1, GradientAccumulationScheduler({0: 1, 1: 3}), **settings)
            assert list(stopped) == list(range(1, steps + 1))

    @pytest.mark.parametrize("budget", [n * 3 * F_D for n in (9, 20, 26, 30, 51)])
    def test_with_batches_of_several_sizes_the_next_is_taken_to_be_the_largest_so_far(self, budget):
        costs = list(spent(budget, sizes=(8, 6, 3, 8, 1)).values())
        assert costs[-1] <= budget < costs[-1] + 8 * 3 * F_D

    def test_with_two_optimizers_that_update_at_different_batches(self):
        def run(budget=None):
            sparse = RigLCallback(0.5, schedule=UpdateSchedule(every=4, end=100), seed=0)
            return list(spent(budget, sparse, module=GAN(), sizes=[8] * 5).values())

        costs = run()
        assert len({b - a for a, b in pairwise(costs)}) == 3
        for batch in range(1, len(costs) - 1):
            assert run(costs[batch]) == run(costs[batch + 1] - 1) == costs[: batch + 1]

    def test_where_the_real_step_is_watched(self):
        costs = spent(None, module=Manual())
        assert list(spent(costs[4], module=Manual())) == [1, 2, 3, 4]

    def test_with_a_method_that_reads_the_dense_gradient_at_every_step(self):
        class EveryStep(pl.Callback):  # in place of a method that no version runs yet
            def on_train_start(self, trainer, module):
                rigl = trainer.callbacks[-1]
                rigl.sparsifier.method = SimpleNamespace(
                    gradient="every_step", latent=False, has=lambda question: False
                )

        class Frozen(RigLCallback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                pass

        costs = spent(None, EveryStep(), Frozen(0.75), sizes=[8] * 3)
        assert list(spent(costs[5] - 1, EveryStep(), Frozen(0.75), sizes=[8] * 3)) == [1, 2, 3, 4]

    def test_of_several_fits_together(self):
        counter, module = FLOPsCallback(budget=70 * 3 * F_D), Small()
        with pytest.warns(UserWarning, match=r"max_steps=7 would spend it"):
            fit(counter, module=module, sizes=[10] * 4)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=f".*{TOO_LONG}")  # the rest of it can be
            for _ in range(2):
                fit(counter, module=module, sizes=[10] * 4)
                assert counter.report().train == 70 * 3 * F_D
        fit(counter, module=Small(), sizes=[10] * 4)
        assert counter.report().train == 40 * 3 * F_D

    def test_after_a_first_step_that_costs_more_there_is_no_training(self):
        class Never(Silent):
            def optimizer_step(self, *args, **kwargs):
                raise AssertionError("a step was made")

        with pytest.raises(MisconfigurationException, match=r"the first optimizer step costs 4\.608e"):
            fit(FLOPsCallback(budget=16 * 3 * F_D - 1), module=Never(), accumulate_grad_batches=2)


class TestResumed:
    @staticmethod
    def run(folder, budget, ckpt=None, epochs=3, **settings):
        class Save(pl.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                trainer.save_checkpoint(folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")

        callbacks = rigl(every=3), Save()
        settings = {"module": small(), "loader": StatefulLoader(), "max_epochs": epochs, **settings}
        return spent(budget, *callbacks, ckpt=ckpt, **settings)

    @pytest.mark.parametrize("budget", ["0.25x", 60_000])
    @pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
    def test_it_stops_at_the_same_step(self, budget, settings, tmp_path):
        straight = self.run(tmp_path, budget, **settings)
        last = len([*tmp_path.iterdir()]) - 1
        assert 4 < last < 20
        for batch in (0, 3, last - 1, last):
            (folder := tmp_path / str(batch)).mkdir()
            again = self.run(folder, budget, tmp_path / f"{batch}.ckpt", **settings)
            assert {**straight, **again} == straight
            assert max(again, default=max(straight)) == max(straight)
            assert len([*folder.iterdir()]) == last - batch  # a spent budget pays for no step more

    def test_a_multiple_is_the_same_after_the_smaller_last_batch_of_an_epoch(self, tmp_path):
        settings = {"module": small(), "loader": samples(60), "max_epochs": 4}
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        straight = spent("0.55x", keep, enable_checkpointing=True, **settings)
        again = spent("0.55x", ckpt=tmp_path / "epoch=0.ckpt", **settings)
        assert max(straight) == max(again) == 17
        assert {**straight, **again} == straight

    def test_with_more_epochs_a_multiple_is_of_the_longer_training(self, tmp_path):
        self.run(tmp_path, "0.25x")
        last = max(tmp_path.iterdir(), key=lambda path: int(path.stem))
        longer = self.run(tmp_path, "0.25x", last, epochs=6)
        assert longer.keys() == {s for s in self.run(tmp_path, "0.25x", epochs=6) if s > int(last.stem) + 1}


class Unequal(Silent):
    """Each process draws batches of its own size."""

    def train_dataloader(self):
        return batches(*[5 + 3 * self.global_rank] * 9)


class SameStep(pl.Callback):
    def __init__(self, steps, budget):
        self.steps, self.budget = steps, budget

    def on_train_end(self, trainer, module):
        assert trainer.global_step == self.steps
        counter = next(c for c in trainer.callbacks if isinstance(c, FLOPsCallback))
        assert (
            counter.report().all_devices <= self.budget < counter.report().all_devices * (1 + 1 / self.steps)
        )


@pytest.mark.parametrize(("budget", "steps"), [(13 * 6 * 3 * F_D, 6), (13 * 6 * 3 * F_D - 1, 5), ("0.5x", 9)])
def test_all_processes_stop_at_the_same_step_and_share_one_budget(budget, steps):
    flops = int(0.5 * 2 * 9 * 13 * 3 * F_D) if budget == "0.5x" else budget
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 2}
    trainer(FLOPsCallback(budget=budget), SameStep(steps, flops), **settings).fit(Unequal())


class TestAMultiple:
    @pytest.mark.parametrize(
        ("loader", "settings"),
        [
            ({"number": 60}, {}),
            ({"number": 60, "drop_last": True}, {"accumulate_grad_batches": 3}),
            ({"number": 60}, {"limit_train_batches": 3, "accumulate_grad_batches": 2}),
            ({"number": 60, "shuffle": True}, {"accumulate_grad_batches": 3, "max_steps": 7}),
            ({"number": 5}, {}),
        ],
    )
    def test_is_one_of_what_the_dense_training_costs_exactly(self, loader, settings, recwarn):
        counter = FLOPsCallback(budget="1x")
        fit(counter, loader=samples(**loader), **{"max_epochs": 3, **settings})
        assert counter._budget._flops == counter.report().train == counter.report().train_dense
        assert not [w for w in recwarn if TOO_LONG in str(w.message)]

    def test_ends_the_training_there(self):
        counter = FLOPsCallback(budget="0.5x")
        run = fit(counter, loader=samples(64), max_epochs=4)
        assert (run.global_step, counter.report().train) == (16, 4 * 64 * 3 * F_D // 2)

    def test_does_not_count_the_epoch_that_weight_averaging_adds(self):
        counter = FLOPsCallback(budget="0.5x")
        average = StochasticWeightAveraging(0.1, 2)
        run = fit(counter, average, module=Noisy(), loader=samples(64), max_epochs=4)
        assert run.global_step == 16

    @pytest.mark.parametrize("base", [Silent, Manual])
    def test_of_an_unknown_length_is_refused_before_training(self, base):
        class Endless(IterableDataset):
            def __iter__(self):
                return iter(batches(*[8] * 9))

        class Never(base):
            def training_step(self, batch, batch_idx):
                raise AssertionError("training has begun")

        loader = DataLoader(Endless(), batch_size=None)
        with pytest.raises(
            MisconfigurationException, match=r"budget='1x'.*length is unknown; give max_steps"
        ):
            fit(FLOPsCallback(budget="1x"), module=Never(), loader=loader, max_epochs=2)
        for budget, arguments in ((40 * 3 * F_D, {}), ("0.5x", {"max_steps": 10})):
            counter = FLOPsCallback(budget=budget)
            run = fit(counter, module=base(), loader=loader, max_epochs=-1, **arguments)
            assert (run.global_step, counter.report().train) == (5, 40 * 3 * F_D)


class TestABudgetThatTheTrainingCannotSpend:
    @pytest.mark.parametrize(
        ("budget", "module", "settings"),
        [("1x", Small, {}), (6 * 60 * 3 * F_D, Small, {"accumulate_grad_batches": 2}), ("1x", Manual, {})],
    )
    def test_is_said_once_with_the_max_steps_that_spend_it(self, budget, module, settings):
        def run(**limits):
            sparse = RigLCallback(0.75, schedule=UpdateSchedule(every=5, end=0.75))
            fit(counter, sparse, module=module(), loader=samples(60, batch_size=4), **settings, **limits)
            return counter.report().train

        counter, flops = FLOPsCallback(budget=budget), 6 * 60 * 3 * F_D
        with pytest.warns(UserWarning, match=TOO_LONG) as record:
            run(max_epochs=6)
        (said,) = [str(w.message) for w in record if TOO_LONG in str(w.message)]
        counter = FLOPsCallback(budget=flops)
        spent = run(max_steps=int(re.search(r"max_steps=(\d+)", said)[1]), max_epochs=-1)
        assert 0.99 * flops <= spent <= flops

    def test_is_not_said_of_a_trial_run(self, recwarn):
        fit(FLOPsCallback(budget=1e9), fast_dev_run=True)
        assert not [w for w in recwarn if TOO_LONG in str(w.message)]

    def test_steps_for_budget_gives_the_length_beforehand(self):
        schedule, module = UpdateSchedule(every=5, end=0.75), small()
        steps = steps_for_budget(
            module.net, (8, 16), budget="1.0x", steps=40, sparsity=0.75, schedule=schedule
        )
        counter, sparse = FLOPsCallback(), RigLCallback(0.75, schedule=schedule)
        run = fit(counter, sparse, module=module, loader=data(), max_steps=steps, max_epochs=-1)
        dense = 40 * 8 * 3 * F_D
        assert run.global_step == steps > 80
        assert sparse.sparsifier.timetable.end == int(0.75 * steps)
        assert counter.report().train <= dense < counter.report().train + 8 * 3 * F_D


@pytest.mark.parametrize(("budget", "steps"), [("0.5x", 12), ("3e7", 3), ("abc", None)])
def test_on_the_command_line(budget, steps, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.setattr(sys, "argv", ["lightning-rigl"])
    runs = []
    monkeypatch.setattr(FLOPsCallback, "on_train_end", lambda self, trainer, module: runs.append(trainer))
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    arguments = [
        *("fit", "--model=examples.cli_model.DigitsMLP", "--data=examples.cli_model.DigitsData"),
        *("--trainer.accelerator=cpu", "--trainer.max_steps=25", *(f"--trainer.{q}=false" for q in quiet)),
        *("--trainer.callbacks+=FLOPsCallback", f"--trainer.callbacks.budget={budget}"),
    ]
    if steps is None:
        with pytest.raises((SystemExit, ValueError)) as refusal:
            cli.main(arguments)
        said = f"{capsys.readouterr().err} {refusal.value}"
        assert "a multiple of the dense training such as '1.0x'" in said
    else:
        cli.main(arguments)
        assert [run.global_step for run in runs] == [steps]
