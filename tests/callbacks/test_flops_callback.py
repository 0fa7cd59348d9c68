"""FLOPsCallback in real trainers: exact totals, on one device and on several, and what the loggers see."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from lightning_rigl import FLOPsCallback, RigLCallback, UpdateSchedule
from tests.callbacks.flops_modules import Noisy
from tests.callbacks.flops_problems import F_D, GAN, Attends, Counts, Silent, batches, fit, rigl
from tests.callbacks.problems import Small, small, trainer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())
pytestmark = pytest.mark.filterwarnings(
    "ignore:RigLCallback. (training has|no topology update)",
    "ignore:.*callbacks used to create the checkpoint",
)


def test_the_golden_run():
    (golden,) = GOLDEN["runs"]

    class LeNet(Silent):
        def __init__(self):
            super().__init__()
            sizes = (784, 300), (300, 100), (100, 10)
            self.net = nn.Sequential(*(m for size in sizes for m in (nn.Linear(*size), nn.ReLU())))

    sparse = RigLCallback(0.9, schedule=UpdateSchedule(every=golden["dT"], end=golden["T_end"]))
    batch = torch.randn(golden["batch"], 784), torch.randint(10, (golden["batch"],))
    loader, counter = DataLoader([batch] * golden["steps"], batch_size=None), FLOPsCallback()
    fit(sparse, counter, module=LeNet(), loader=loader, log_every_n_steps=500)
    report = counter.report()
    assert (report.forward, report.forward_dense) == (golden["fS_from_nnz"], golden["fD"])
    assert report.train == golden["paper_schedule_total"] == 10_437_126_784
    assert report.train_actual == golden["actual_total"] == 8_041_606_784


class TestOneDevice:
    def test_without_a_rigl_callback_the_dense_model_is_counted(self):
        counter = FLOPsCallback()
        fit(counter, max_epochs=2)
        report = counter.report()
        assert (report.forward, report.forward_dense) == (F_D, F_D)
        assert (report.train, report.train_dense, report.train_ratio) == (40 * 3 * F_D, 40 * 3 * F_D, 1.0)
        assert [(row.name, row.active) for row in report.layers] == [
            ("net.0.weight", 384),
            ("net.2.weight", 96),
        ]

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("method", ["rigl", "set", "static"])
    def test_each_step_costs_what_held_before_its_update(self, order, method):
        sparse, counter = rigl(method=method), FLOPsCallback()
        fit(*[sparse, counter][::order], counts := Counts(sparse), sizes=(8, 8, 8, 8, 3))
        assert counts.updates == ([] if method == "static" else [2, 4])
        updates = [n * (F_D - f_s) for n, f_s in (counts.batches[2], counts.batches[4])]
        report = counter.report()
        assert report.train == counts.ordinary + (sum(updates) if method == "rigl" else 0)
        assert report.train_dense == 35 * 3 * F_D
        assert report.forward == counts.f_s < F_D / 2

    def test_every_micro_batch_of_an_update_window_gives_its_share_of_the_dense_gradient(self):
        sparse, counter = rigl(every=1), FLOPsCallback()
        # windows: 8 8 | 8 8 update | 4 update: the last one of the epoch is shorter
        fit(sparse, counter, counts := Counts(sparse), sizes=(8, 8, 8, 8, 4), accumulate_grad_batches=2)
        assert counts.updates == [3, 4]
        first, last = (sparse.sparsifier.counts[f"net.{i}.weight"] for i in (0, 2))
        assert counter.report().train == counts.ordinary + 20 * (F_D - counts.f_s)
        # forward, and the gradients: of both weights, and of the input of the second layer only
        ordinary = 36 * 2 * (2 * first + 3 * last)
        assert counter.report().train_actual == ordinary + 20 * 2 * (384 - first + 96 - last)

    @pytest.mark.parametrize(
        ("frozen", "first", "last"),
        [((), 2, 3), (("net.0.weight", "net.0.bias"), 1, 2), (("net.2.weight", "net.2.bias"), 2, 2)],
    )
    def test_gradients_that_autograd_does_not_compute_are_not_in_train_actual(self, frozen, first, last):
        module, counter = small(), FLOPsCallback()
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
        fit(counter, module=module)
        assert counter.report().train_actual == 20 * 2 * (first * 384 + last * 96)
        assert counter.report().train == 20 * 3 * F_D

    def test_layers_that_thaw_at_an_epoch_are_measured_again(self):
        class Thaw(pl.Callback):
            def on_train_epoch_start(self, trainer, module):
                module.net[0].requires_grad_(trainer.current_epoch > 0)

        counter = FLOPsCallback()
        fit(counter, Thaw(), max_epochs=2)
        frozen, trained = 2 * (384 + 2 * 96), 2 * (2 * 384 + 3 * 96)
        assert counter.report().train_actual == 20 * (frozen + trained)

    def test_a_method_that_reads_the_dense_gradient_at_every_step_pays_for_it(self):
        class EveryStep(pl.Callback):  # in place of a method that no version runs yet
            def on_train_start(self, trainer, module):
                sparse.sparsifier.method = SimpleNamespace(
                    gradient="every_step", latent=False, has=lambda question: False
                )

        class Frozen(RigLCallback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                pass

        sparse, counter = Frozen(0.75), FLOPsCallback()
        fit(sparse, counter, EveryStep())
        f_s = counter.report().forward
        assert f_s < F_D
        assert counter.report().train == 20 * (2 * f_s + F_D)

    def test_counts_that_change_without_an_update_hold_from_the_next_step_on(self):
        class Prune(pl.Callback):
            def on_after_backward(self, trainer, module):
                sparse.sparsifier.layers["net.0.weight"].count = (9, 5, 0)[trainer.global_step]
                costs.append(2 * sum(sparse.sparsifier.counts.values()))

        sparse, counter, costs = rigl(every=50), FLOPsCallback(), []
        fit(sparse, counts := Counts(sparse), Prune(), counter)
        assert counter.report().train == 3 * (8 * counts.batches[0][1] + 8 * costs[0] + 4 * costs[1])
        assert counter.report().forward == costs[2]

    def test_the_official_convention_adds_one_flop_per_output_element(self):
        sparse, counter = rigl(every=50), FLOPsCallback("official")
        fit(sparse, counter)
        report = counter.report()
        f_s = sum(2 * count for count in sparse.sparsifier.counts.values()) + 28
        assert (report.forward, report.forward_dense, report.train) == (f_s, F_D + 28, 20 * 3 * f_s)

    def test_validation_is_not_training(self):
        counter = FLOPsCallback()
        trainer(counter, val_check_interval=1, max_epochs=1).fit(Small(), batches(8, 8), batches(8, 8))
        assert (counter.report().train, counter.report().inference) == (16 * 3 * F_D, F_D)

    def test_nor_is_the_epoch_that_weight_averaging_adds_for_its_statistics(self):
        counter = FLOPsCallback()
        run = fit(counter, StochasticWeightAveraging(0.1, 1), module=Noisy(), max_epochs=3)
        assert run.current_epoch == 4
        assert counter.report().train == 3 * 20 * 3 * F_D

    @pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
    def test_precision_changes_nothing(self, precision):
        counter = FLOPsCallback()
        fit(counter, precision=precision)
        assert counter.report().train == 20 * 3 * F_D

    def test_what_cannot_be_answered_is_refused_in_words(self):
        with pytest.raises(RuntimeError, match="after the first training batch"):
            FLOPsCallback().report()
        with pytest.raises(ValueError, match="the known ones are 2mac, official"):
            FLOPsCallback("mac")


def test_a_slice_of_a_parameter_has_the_active_connections_of_its_mask():
    class Rows(pl.Callback):
        """What the in-projection of each batch costs, by the mask before it: a query of 16 and 3 x 32."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rows = sparse.masks["attention.in_proj_weight"].sum(1)
            costs.append(int(2 * (rows[:16].sum() + 3 * rows[16:].sum())))
            rest.append(sum(2 * int(m.sum()) for n, m in sparse.masks.items() if "in_proj" not in n))

    sparse, counter, costs, rest = rigl(every=1), FLOPsCallback(), [], []
    fit(sparse, counter, Rows(), module=Attends(), sizes=[8] * 6)
    assert sparse.sparsifier.updates == 5
    assert len(set(costs)) > 1
    dense = 2 * (256 + 3 * 512 + 256 + 384 + 96)
    scores = counter.report().other
    updates = [dense - c - r for c, r in zip(costs[1:], rest[1:], strict=True)]
    assert counter.report().forward_dense == dense + scores
    assert counter.report().train == 8 * (3 * (sum(costs) + sum(rest) + 6 * scores) + sum(updates))


def test_an_update_of_one_optimizer_pays_the_dense_gradient_of_its_own_layers():
    sparse, counter = RigLCallback(0.5, schedule=UpdateSchedule(every=4, end=100)), FLOPsCallback()
    fit(sparse, counter, module=GAN(), sizes=[8] * 7)
    # by their own steps: the critic at batches 2, 4 and 6, the generator at batch 4
    assert {name: layer.last for name, layer in sparse.sparsifier.layers.items()} == {
        "generator.weight": 4,
        "critic.weight": 12,
    }
    g, c = sparse.sparsifier.counts.values()
    ordinary = 3 * 2 * (3 * g + 3 * c)
    assert counter.report().train == 8 * (7 * ordinary + 3 * 6 * (48 - c) + 6 * (192 - g))
    # both forward three times; the generator's pass needs the gradient of the critic's input
    actual = 2 * (3 * g + 3 * c + c + g + 2 * c)
    assert counter.report().train_actual == 8 * (7 * actual + 3 * 4 * (48 - c) + 2 * (192 - g))


class Unequal(Silent):
    """Each process draws batches of its own size."""

    def train_dataloader(self):
        return batches(*[5 + 3 * self.global_rank] * 3)


class OfAllDevices(pl.Callback):
    def on_train_end(self, trainer, module):
        counter, counts = trainer.callbacks[1:3]
        own, report = 5 + 3 * trainer.global_rank, counter.report()
        assert report.train == counts.ordinary + own * sum(F_D - counts.f_s for _ in counts.updates)
        assert report.train_dense == 3 * own * 3 * F_D
        share = report.train // own
        assert report.train == own * share
        assert report.all_devices == 13 * share
        assert f"all devices, at the last epoch end: {13 * share:,}" in str(report)
        assert trainer.callback_metrics["flops/train_all_devices"].item() == 13 * share


def test_each_device_counts_its_own_samples_and_the_sum_is_exact(recwarn):
    sparse = rigl()
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    run = trainer(sparse, FLOPsCallback(), Counts(sparse), OfAllDevices(), max_epochs=1, **settings)
    run.fit(Unequal())
    assert {"flops/train", "flops/train_all_devices"} < set(run.callback_metrics)
    assert not [w for w in recwarn if "sync_dist" in str(w.message)]


class Memory(Logger):
    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.points = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "flops/train" in metrics:
            self.points.append((step, metrics["flops/train"], metrics["flops/train_actual"]))


class TestLogging:
    def test_at_updates_at_the_rhythm_of_the_trainer_and_at_epoch_ends(self):
        counter, sparse, memory = FLOPsCallback(), rigl(every=3, end=8), Memory()
        fit(counter, sparse, sizes=[8] * 10, log_every_n_steps=5, logger=memory)
        first, last = sparse.sparsifier.counts.values()
        f_s = 2 * (first + last)
        # updates in place of steps 3 and 6, the trainer's rhythm at 4 and 9, the end of the epoch at 9
        after = [(3, 4, 1), (4, 5, 1), (6, 7, 2), (9, 10, 2), (9, 10, 2)]
        assert memory.points == [
            (
                step,
                8 * (3 * f_s * steps + (F_D - f_s) * updates),
                8 * (2 * (2 * first + 3 * last) * steps + (F_D - f_s) * updates),
            )
            for step, steps, updates in after
        ]

    def test_the_values_are_the_report_in_double_precision(self):
        counter = FLOPsCallback()
        run = fit(rigl(every=50), counter)
        for name in ("forward", "train", "train_actual", "forward_ratio", "train_ratio"):
            value = run.callback_metrics[f"flops/{name}"]
            assert value.dtype == torch.float64
            assert value.item() == getattr(counter.report(), name)

    def test_a_barebones_run_is_counted_and_logs_nothing(self):
        counter = FLOPsCallback()
        pl.Trainer(callbacks=[counter, rigl(every=1)], barebones=True, max_epochs=1, accelerator="cpu").fit(
            Silent(), batches(8, 8)
        )
        assert counter.report().train_dense == 16 * 3 * F_D
