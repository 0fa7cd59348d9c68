"""FLOPsCallback in real trainers: exact totals, one measurement, no trace of it."""

import copy
import json
import pickle
import random
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.data import DataLoader

from lightning_rigl.callbacks import flops, twin
from lightning_rigl.callbacks.flops import FLOPsCallback
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.topology.schedules import UpdateSchedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flops_golden.json").read_text())
F_D = 2 * (12 * 8 + 8 * 4)  # of Net, per sample


class Net(LightningModule):
    """12 -> 8 -> 4, with everything that a measurement could disturb."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4)
        )

    def loss(self, batch):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


class Quiet(Net):
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(n, 12, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes
    ]
    return DataLoader(data, batch_size=None)


def trainer(*callbacks, **kwargs):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def fit(model, *callbacks, sizes=(8, 8, 4), **kwargs):
    run = trainer(*callbacks, **kwargs)
    run.fit(model, batches(*sizes))
    return run


def rigl(every=2, end=100, **kwargs):
    return RigLCallback(0.75, schedule=UpdateSchedule(every=every, end=end), **kwargs)


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harmless = "many workers|LeafSpec|GPU|number of training|fork|hostname|ends before the updates"
        warnings.filterwarnings("ignore", message=f".*({harmless}).*")
        yield


class Counts(Callback):
    """Writes down f_S and the batch size of every step, by the masks themselves."""

    def __init__(self, rigl):
        self.rigl, self.steps = rigl, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        sizes = [2 * int(mask.sum()) for mask in self.rigl.masks.values()]
        self.steps.append((len(batch[0]), sum(sizes)))


# --------------------------------------------------------------------------------------------- totals


def test_without_a_rigl_callback_the_dense_model_is_counted():
    counter = FLOPsCallback()
    fit(Net(), counter, max_epochs=2)
    report = counter.report()
    assert (report.forward, report.forward_dense) == (F_D, F_D)
    assert (report.train, report.train_dense) == (40 * 3 * F_D, 40 * 3 * F_D)
    assert (report.forward_ratio, report.train_ratio) == (1.0, 1.0)
    assert [(row.name, row.active, row.total) for row in report.layers] == [
        ("net.0.weight", 96, 96),
        ("net.4.weight", 32, 32),
    ]


def test_the_golden_run():
    golden = GOLDEN["runs"][0]
    assert (golden["net"], golden["dist"], golden["sparsity"]) == ("lenet_300_100", "erk", 0.9)

    class LeNet(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
            )

    sparse = RigLCallback(0.9, schedule=UpdateSchedule(every=golden["dT"], end=golden["T_end"]))
    counter = FLOPsCallback()
    batch = (torch.randn(golden["batch"], 784), torch.randint(10, (golden["batch"],)))
    trainer(sparse, counter).fit(LeNet(), DataLoader([batch] * golden["steps"], batch_size=None))
    report = counter.report()
    assert report.forward == golden["fS_from_nnz"]
    assert report.forward_dense == golden["fD"]
    assert report.train == golden["paper_schedule_total"] == 10_437_126_784


@pytest.mark.parametrize("order", ["rigl first", "flops first"])
@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_each_step_costs_what_held_before_its_update(order, method):
    sparse = rigl(method=method)
    counts, counter = Counts(sparse), FLOPsCallback()
    pair = [sparse, counter] if order == "rigl first" else [counter, sparse]
    fit(Net(), *pair, counts, sizes=(8, 8, 8, 8, 3))
    expected = sum(3 * n * f_s for n, f_s in counts.steps)
    if method == "rigl":  # updates at steps 2 and 4, the third and the last batch
        assert sparse.sparsifier.updates == 2
        expected += sum(n * (F_D - f_s) for n, f_s in [counts.steps[2], counts.steps[4]])
    report = counter.report()
    assert report.train == expected
    assert report.train_dense == 35 * 3 * F_D
    assert report.forward == sum(2 * count for count in sparse.sparsifier.counts.values()) < F_D / 2


def test_the_dense_gradient_of_an_update_is_that_of_its_whole_accumulation_window():
    sparse, counter = rigl(every=1), FLOPsCallback()
    counts = Counts(sparse)
    # windows: 8 8 | 8 8 update | 4 update, shorter at the end of the epoch
    fit(Net(), sparse, counter, counts, sizes=(8, 8, 8, 8, 4), accumulate_grad_batches=2)
    assert sparse.sparsifier.updates == 2
    f_s = counts.steps[0][1]
    assert counter.report().train == 36 * 3 * f_s + (8 + 8 + 4) * (F_D - f_s)


def test_a_method_that_reads_the_dense_gradient_at_every_step_pays_for_it():
    class EveryStep(Callback):  # in place of a method that no version runs yet
        def on_train_start(self, trainer, module):
            sparse.sparsifier.method = SimpleNamespace(gradient="every_step")

    class Frozen(RigLCallback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            pass

    sparse, counter = Frozen(0.75), FLOPsCallback()
    fit(Net(), sparse, counter, EveryStep())
    f_s = counter.report().forward
    assert f_s < F_D
    assert counter.report().train == 20 * (2 * f_s + F_D)


def test_counts_that_change_without_an_update_hold_from_the_next_step_on():
    class Prune(Callback):
        def on_after_backward(self, trainer, module):
            first, last = (sparse.sparsifier.layers[name] for name in ("net.0.weight", "net.4.weight"))
            first.count = (9, 5, 0)[trainer.global_step]
            costs.append(2 * (first.count + last.count))

    sparse, counter, costs = rigl(every=50), FLOPsCallback(), []
    counts = Counts(sparse)
    fit(Net(), sparse, counts, Prune(), counter)
    assert counter.report().train == 3 * (8 * counts.steps[0][1] + 8 * costs[0] + 4 * costs[1])
    assert counter.report().forward == costs[2]


def test_the_official_convention_adds_one_flop_per_output_element():
    sparse, counter = rigl(every=50), FLOPsCallback("official")
    fit(Net(), sparse, counter)
    report = counter.report()
    f_s = sum(2 * count for count in sparse.sparsifier.counts.values()) + 12
    assert (report.forward, report.forward_dense, report.train) == (f_s, F_D + 12, 20 * 3 * f_s)


def test_validation_is_not_training():
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    counter = FLOPsCallback()
    trainer(counter, val_check_interval=1).fit(Validated(), batches(8, 8), batches(8, 8))
    assert counter.report().train == 16 * 3 * F_D


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision_changes_nothing(precision):
    counter = FLOPsCallback()
    with no_warnings():
        fit(Net(), counter, precision=precision)
    assert counter.report().train == 20 * 3 * F_D


class OnEachDevice(Counts):
    def on_train_end(self, trainer, module):
        counter = next(c for c in trainer.callbacks if isinstance(c, FLOPsCallback))
        assert len(self.steps) == 2
        assert counter.report().train == sum(3 * n * f_s for n, f_s in self.steps)
        assert counter.report().train_dense == sum(3 * n * F_D for n, _ in self.steps)


def test_in_a_distributed_run_each_device_counts_its_own_samples_without_advice_to_average():
    static = rigl(method="static")
    with no_warnings():
        run = fit(Quiet(), static, FLOPsCallback(), OnEachDevice(static), devices=2, strategy="ddp_fork")
    assert "flops/train" in run.callback_metrics


# -------------------------------------------------------------------------------------- the measurement


class Item(Net):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        assert loss.item() > 0
        return loss


class OnlyBatch(Net):
    def training_step(self, batch):
        return self.loss(batch)


class AsksTheTrainer(Net):
    def training_step(self, batch, batch_idx):
        assert self.trainer.global_step >= 0
        return self.loss(batch)


class OwnDevice(Net):
    def training_step(self, batch, batch_idx):
        return self.loss([batch[0] + torch.zeros(12, device=self.device), batch[1]])


class PlainTensor(Net):
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(4)  # neither parameter nor buffer

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]), batch[1], self.weights)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class OwnLoop(Net):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class Counted(Net):
    """Keeps plain Python state in its step, and draws from every global generator."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        batch = [batch[0] * random.random() + np.random.rand() + torch.rand(1), batch[1]]
        return self.loss(batch)


ON_A_COPY = [Net, OnlyBatch, OwnDevice, PlainTensor]
IN_VAIN_ON_A_COPY = [Item, AsksTheTrainer, Counted]
ON_A_REAL_STEP = [Manual, OwnLoop]
EVERY_KIND = [*ON_A_COPY, *IN_VAIN_ON_A_COPY, *ON_A_REAL_STEP]


def watch_measurements(monkeypatch):
    """One entry per tracer that is made: whether it looks at a copy without values."""
    made = []

    class Watched(flops.Tracer):
        def __init__(self, parameters):
            super().__init__(parameters)
            made.append(all(p.is_meta for p in parameters.values()))

    monkeypatch.setattr(flops, "Tracer", Watched)
    monkeypatch.setattr(twin, "Tracer", Watched)
    return made


@pytest.mark.parametrize("model", EVERY_KIND)
def test_the_model_is_measured_once_on_a_copy_or_else_on_the_real_step(model, monkeypatch):
    made, counter = watch_measurements(monkeypatch), FLOPsCallback()
    fit(model(), counter, max_epochs=2)
    on_a_copy = [True] if model in ON_A_COPY else [True, False]
    assert made == ([False] if model in ON_A_REAL_STEP else on_a_copy)
    report = counter.report()
    assert (report.train, report.unknown, report.other) == (40 * 3 * F_D, (), 0)


def test_a_compiled_lightning_module_is_measured_as_written(monkeypatch):
    made, counter, module = watch_measurements(monkeypatch), FLOPsCallback(), Quiet()
    fit(torch.compile(module, backend="eager"), counter)
    assert made == [False]  # its compiled step is bound to the original
    assert counter.report().train == 20 * 3 * F_D


def state_of(model):
    return {
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "calls": getattr(model, "calls", 0),
    }


@pytest.mark.parametrize("model", EVERY_KIND)
def test_training_with_the_callback_is_training_without_it(model):
    states = []
    for callbacks in ([], [FLOPsCallback()]):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        module = model()
        fit(module, *callbacks)
        states.append(state_of(module))
    assert states[0] == states[1]


@pytest.mark.parametrize("model", [Net, Item, Manual])
def test_a_measurement_leaves_nothing_behind_when_the_first_step_begins(model):
    class Compare(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.states = [*getattr(self, "states", []), state_of(module)]

    before, after = Compare(), Compare()
    fit(model(), before, FLOPsCallback(), after)
    assert before.states[0] == after.states[0]


class Watch(Callback):
    """Whether a tracer is at work, at each hook of each step."""

    def __init__(self):
        self.seen = {}

    def note(self, hook):
        self.seen.setdefault(hook, []).append(_len_torch_dispatch_stack())

    def on_train_batch_start(self, *args):
        self.note("start")

    def on_after_backward(self, *args):
        self.note("after backward")

    def on_train_batch_end(self, *args):
        self.note("end")


@pytest.mark.parametrize(("model", "start", "backward"), [(Net, 0, 0), (Item, 1, 0), (Manual, 1, 1)])
def test_only_the_first_step_is_ever_watched_and_of_it_the_forward_pass(model, start, backward):
    watch = Watch()
    fit(model(), FLOPsCallback(), watch)
    assert watch.seen == {"start": [start, 0, 0], "after backward": [backward, 0, 0], "end": [0, 0, 0]}


def test_a_first_step_that_fails_is_not_watched_any_longer():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    counter = FLOPsCallback()
    with pytest.raises(KeyError, match="mine"):
        fit(Fails(), counter)
    assert _len_torch_dispatch_stack() == 0
    assert copy.deepcopy(counter)._tracer is None  # its weak references must not be copied


def test_an_epoch_that_is_cut_short_in_its_first_batch_is_not_watched_any_longer():
    class Skips(Item):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

    class Nothing(Callback):
        def on_train_epoch_start(self, trainer, module):
            assert _len_torch_dispatch_stack() == 0

    counter = FLOPsCallback()
    fit(Skips(), Nothing(), counter, max_epochs=2)
    assert counter.report().train == 20 * 3 * F_D


def test_the_copy_shares_data_sets(monkeypatch):
    class Greedy(torch.utils.data.Dataset):
        def __deepcopy__(self, memo):
            raise AssertionError("a data set was copied")

    class Holder(Net):
        def __init__(self):
            super().__init__()
            self.data = Greedy()

    made = watch_measurements(monkeypatch)
    fit(Holder(), FLOPsCallback())
    assert made == [True]


def test_the_copy_does_not_see_the_trainer_wherever_the_module_keeps_it():
    class Keeps(Net):
        def on_fit_start(self):
            self.boss = self.trainer

        def training_step(self, batch, batch_idx):
            seen.append(self.boss)
            return self.loss(batch)

    seen = []
    run = fit(Keeps(), FLOPsCallback())
    assert seen == [None, run, run, run]


def test_logging_inside_the_copy_is_silent(capsys, monkeypatch):
    class Talks(Net):
        def training_step(self, batch, batch_idx):
            self.log_dict({"a": 1.0})
            self.print("once per step")
            return super().training_step(batch, batch_idx)

    made = watch_measurements(monkeypatch)
    with no_warnings():
        run = fit(Talks(), FLOPsCallback())
    assert made == [True]
    assert capsys.readouterr().out.count("once per step") == 3
    assert {"a", "loss"} < set(run.callback_metrics)


def test_manual_optimization_counts_every_forward_pass_of_its_step():
    class Gan(Manual):
        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(4, 1, bias=False)

        def configure_optimizers(self):
            networks = (self.net, self.critic)
            return [torch.optim.AdamW(n.parameters(), weight_decay=0.1) for n in networks]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.net(batch[0])).mean())
                optimizer.step()

    counter = FLOPsCallback()
    fit(Gan(), counter)
    assert counter.report().forward == 2 * (F_D + 2 * 4)
    assert counter.report().unknown == ()


@pytest.mark.parametrize("base", [Quiet, Item])
def test_an_operator_that_is_not_counted_is_warned_of_once_by_name(base):
    class Masked(base):
        def loss(self, batch):
            hidden = self.net[:4](batch[0])
            return functional.linear(hidden, self.net[4].weight * torch.ones_like(hidden[:4])).exp().sum()

    counter = FLOPsCallback()
    with pytest.warns(UserWarning, match=r"not counted.*aten\.mul \(net\.4\.weight\)") as record:
        fit(Masked(), counter, max_epochs=2)
    assert sum("not counted" in str(warning.message) for warning in record) == 1
    assert counter.report().unknown == ("aten.mul (net.4.weight)",)
    assert counter.report().other == 2 * 32


# ---------------------------------------------------------------------------------------- odd batches


class Bag:
    """A batch that no one can look into."""

    def __init__(self, batch):
        self.batch, self.uses = batch, 0


def test_a_batch_of_unknown_size_counts_as_one_sample_and_is_warned_of_once():
    class Bags(Net):
        def training_step(self, batch, batch_idx):
            batch.uses += 1
            return self.loss(batch.batch)

    counter = FLOPsCallback()
    data = [Bag(batch) for batch in batches(8, 8, 8)]
    with pytest.warns(UserWarning, match="type Bag counts as one sample") as record:
        trainer(counter).fit(Bags(), DataLoader(data, batch_size=None))
    assert sum("one sample" in str(warning.message) for warning in record) == 1
    assert [bag.uses for bag in data] == [1, 1, 1]  # none was shown to a copy of the module
    assert counter.report().train == 3 * 3 * 8 * F_D  # the first batch held 8


def test_empty_batches_and_batches_that_are_none_cost_nothing():
    class Careful(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if len(batch[0]) else None

    counter = FLOPsCallback()
    empty = (torch.zeros(0, 12), torch.zeros(0, dtype=torch.long))
    data = [empty, *batches(8), None, empty, *batches(8)]
    trainer(counter).fit(Careful(), DataLoader(data, batch_size=None))
    assert counter.report().train == 16 * 3 * F_D


# ------------------------------------------------------------------------------- resume, again, elsewhere


def test_a_resumed_run_ends_with_the_same_totals_and_measures_nothing_again(tmp_path, monkeypatch):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(5)
        counter = FLOPsCallback()
        fitter = trainer(rigl(seed=1), counter, max_epochs=epochs, accumulate_grad_batches=2)
        fitter.fit(Net(), batches(8, 8, 8, 4), ckpt_path=ckpt_path, weights_only=True)
        fitter.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return counter

    whole = run(4).report()
    run(2)
    made = watch_measurements(monkeypatch)
    assert run(4, tmp_path / "2.ckpt").report() == whole
    assert made == []


def test_the_state_is_plain_and_holds_an_open_accumulation_window():
    counter = FLOPsCallback()
    counter._run = flops.RunCost(10**30, 10**31, 24)
    fit(Net(), counter, rigl(method="static"), sizes=(8,))
    state = pickle.loads(pickle.dumps(counter.state_dict()))
    assert json.loads(json.dumps(state)) == state
    other = FLOPsCallback()
    other.load_state_dict(state)
    assert other.report() == counter.report()
    assert other.report().train == 10**30 + 8 * 3 * other.report().forward < 10**30 + 8 * 3 * F_D
    assert other._run.pending == 0


def test_a_checkpoint_within_an_accumulation_window_keeps_its_samples():
    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            states.append(counter.state_dict())

    states, counter = [], FLOPsCallback()
    fit(Net(), counter, Keep(), sizes=(8, 8, 8), accumulate_grad_batches=2)
    assert [state["run"]["pending"] for state in states] == [8, 0, 0]


def test_totals_of_another_convention_are_refused():
    official = FLOPsCallback("official")
    with pytest.raises(MisconfigurationException, match="continue with that one"):
        official.load_state_dict(FLOPsCallback().state_dict())


def test_totals_continue_from_fit_to_fit_and_start_anew_with_another_model():
    counter, module = FLOPsCallback(), Net()
    fit(module, counter)
    fit(module, counter)
    assert counter.report().train == 2 * 20 * 3 * F_D
    fit(Net(), counter)
    assert counter.report().train == 20 * 3 * F_D


def test_totals_start_anew_when_the_layers_of_a_module_change():
    counter, wide = FLOPsCallback(), Net()
    fit(wide, counter)
    wide.net[0], wide.net[1], wide.net[4] = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
    with pytest.warns(UserWarning, match="start anew"):
        fit(wide, counter)
    assert counter.report().train == 20 * 3 * 2 * F_D


def test_a_validation_of_an_earlier_checkpoint_leaves_the_totals_alone(tmp_path):
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    counter, module = FLOPsCallback(), Validated()
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    run = trainer(counter, keep, enable_checkpointing=True)
    run.fit(module, batches(*[8] * 20))
    spent = counter.report().train
    early = tmp_path / "step=5.ckpt"
    run.validate(module, batches(8), ckpt_path=early, verbose=False)
    assert counter.report().train == spent == 160 * 3 * F_D
    fresh = FLOPsCallback()
    trainer(fresh).validate(module, batches(8), ckpt_path=early, verbose=False)
    assert fresh.report().train == spent // 4  # what the checkpoint knows


def test_a_first_batch_without_a_product_is_not_taken_for_the_model():
    class Late(Net):
        def training_step(self, batch, batch_idx):
            return (
                None if self.global_step == 0 and batch_idx == 0 else super().training_step(batch, batch_idx)
            )

    counter = FLOPsCallback()
    fit(Late(), counter)
    assert counter.report().forward_dense == F_D


def test_a_used_callback_can_be_copied_and_pickled_without_the_model():
    counter = FLOPsCallback()
    fit(Item(), counter)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert other.report() == counter.report()
    assert len(pickle.dumps(counter)) < 1500


# ---------------------------------------------------------------------------------------------- logging


class Memory(Logger):
    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.points = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "flops/train" in metrics:
            self.points.append((step, metrics["flops/train"]))


def test_totals_are_logged_at_updates_at_the_rhythm_of_the_trainer_and_at_epoch_ends():
    counter, sparse, memory = FLOPsCallback(), rigl(every=3, end=8), Memory()
    counts = Counts(sparse)
    fit(Net(), counter, sparse, counts, sizes=[8] * 10, log_every_n_steps=5, logger=memory)
    f_s = counts.steps[0][1]
    after = [
        8 * (3 * f_s * step + (F_D - f_s) * updates) for step, updates in [(4, 1), (5, 1), (7, 2), (10, 2)]
    ]
    # updates in place of steps 3 and 6, the trainer's rhythm at 4 and 9, the end of the epoch at 9
    assert memory.points == list(zip([3, 4, 6, 9, 9], [*after, after[-1]], strict=True))


def test_the_logged_values_are_the_report_in_double_precision():
    counter = FLOPsCallback()
    run = fit(Net(), rigl(every=50), counter)
    report, metrics = counter.report(), run.callback_metrics
    for name in ("forward", "train", "forward_ratio", "train_ratio"):
        assert metrics[f"flops/{name}"].dtype == torch.float64
        assert metrics[f"flops/{name}"].item() == getattr(report, name)


def test_a_barebones_run_is_counted_and_logs_nothing():
    counter = FLOPsCallback()
    with no_warnings():
        Trainer(callbacks=[counter, rigl(every=1)], barebones=True, max_epochs=1, accelerator="cpu").fit(
            Item(), batches(8, 8)
        )
    assert counter.report().train_dense == 16 * 3 * F_D


# --------------------------------------------------------------------------------------------- bad input


def test_a_report_before_the_first_batch_is_refused_in_words():
    with pytest.raises(RuntimeError, match="after the first training batch"):
        FLOPsCallback().report()


def test_an_unknown_convention_is_refused_at_once():
    with pytest.raises(ValueError, match="the known ones are 2mac, official"):
        FLOPsCallback("mac")
