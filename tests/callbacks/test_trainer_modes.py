"""Ways to run a Trainer: each changes what is trained on, never what a topology update or a mask is."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_rigl import FLOPsCallback, RigLCallback, Sparsifier, UpdateSchedule
from tests.callbacks.problems import Small, data, small, trainer

SCHEDULE = UpdateSchedule(every=4, end=30, drop_fraction=0.5)
SEARCH = {"num_training_steps": 20}
TRIALS = {"max_trials": 2, "steps_per_trial": 2, "init_val": 4}


class Watch(pl.Callback):
    """The masks a fit starts with; the steps of its updates; after each batch, the zeros and the counts."""

    def __init__(self, rigl):
        self.rigl, self.updates, self.start, self.batches = rigl, [], {}, 0

    def on_train_start(self, trainer, module):
        self.start = copies(self.rigl.masks)
        self.done = self.rigl.sparsifier.updates

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        for name, mask in self.rigl.masks.items():
            assert (module.get_parameter(name)[~mask] == 0).all()
        active = sum(int(mask.sum()) for mask in self.rigl.masks.values())
        assert active / 480 == self.rigl.sparsifier.density
        if self.rigl.sparsifier.updates > self.done + len(self.updates):
            self.updates.append(trainer.global_step - 1)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def said(run):
    """What the callbacks of this package warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "RigLCallback" in str(w.message)]


def plain_loop(batches):
    """The same training without a Trainer."""
    module = small()
    sparsifier, optimizer = Sparsifier(module, 0.8, schedule=SCHEDULE, seed=0), module.configure_optimizers()
    sparsifier.start()
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    return module, sparsifier


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))


class TestModes:
    """Updates at their steps, and the weights of a plain loop over the same batches."""

    @pytest.mark.parametrize(
        ("arguments", "batches"),  # of each epoch
        [
            ({}, [8] * 5),
            ({"num_sanity_val_steps": 2}, [8] * 5),
            ({"overfit_batches": 2, "max_epochs": 9}, [2] * 9),
            ({"limit_train_batches": 3}, [3] * 5),
            ({"limit_train_batches": 0.5}, [4] * 5),
            ({"max_steps": 19, "max_epochs": -1}, [8, 8, 3]),
            ({"fast_dev_run": True}, [1]),
            ({"fast_dev_run": 7}, [7]),
            ({"barebones": True, **QUIET}, [8] * 5),
            ({"detect_anomaly": True}, [8] * 5),
            ({"inference_mode": False}, [8] * 5),
            ({"max_time": "00:01:00:00"}, [8] * 5),
            ({"min_epochs": 2, "max_epochs": 4}, [8] * 4),
            ({"check_val_every_n_epoch": 2, "val_check_interval": 3}, [8] * 5),
        ],
        ids=str,
    )
    def test_each_mode(self, arguments, batches):
        rigl, module = RigLCallback(0.8, schedule=SCHEDULE, seed=0), small()
        watch = Watch(rigl)
        fit = trainer(rigl, FLOPsCallback(), watch, **arguments)
        warned = said(lambda: fit.fit(module, data(), data(16)))
        expected = [batch for count in batches for batch in list(data())[:count]]
        assert watch.batches == len(expected)
        assert watch.updates == [step for step in range(4, 30, 4) if step < len(expected)]
        assert warned == [] or "before the updates do" in warned[0]
        by_hand, sparsifier = plain_loop(expected)
        assert same(module.state_dict(), by_hand.state_dict())
        assert same(rigl.masks, sparsifier.masks)

    @pytest.mark.parametrize(
        ("arguments", "steps"), [({}, 8), ({"min_epochs": 3}, 24), ({"min_steps": 21}, 21)], ids=str
    )
    def test_early_stopping_ends_the_updates_with_the_training(self, arguments, steps):
        rigl, module = RigLCallback(0.8, schedule=SCHEDULE, seed=0), small()
        stop, watch = EarlyStopping("val_loss", stopping_threshold=9.0), Watch(rigl)
        trainer(rigl, watch, stop, **arguments).fit(module, data(), data(16))
        assert watch.batches == steps
        assert watch.updates == [*range(4, steps, 4)]
        by_hand, sparsifier = plain_loop((list(data()) * 3)[:steps])
        assert same(module.state_dict(), by_hand.state_dict())
        assert same(rigl.masks, sparsifier.masks)

    def test_time_that_has_run_out(self):
        rigl, module = RigLCallback(0.8, schedule=SCHEDULE, seed=0), small()
        watch = Watch(rigl)
        trainer(rigl, watch, max_epochs=-1, max_time={"seconds": 0}).fit(module, data())
        assert watch.updates == []
        for name, mask in watch.start.items():
            assert (module.get_parameter(name)[~mask] == 0).all()


class Stream(IterableDataset):
    """Without a length, and by default without an end."""

    def __init__(self, samples=None):
        self.samples = samples

    def __iter__(self):
        generator, i = torch.Generator().manual_seed(3), 0
        while self.samples is None or i < self.samples:
            x, i = torch.randn(16, generator=generator), i + 1
            yield x, x[:4].argmax()


class TestUnknownLength:
    """An end in steps runs; a fraction of what nobody knows is refused before the model is changed."""

    ENDLESS = (Stream(), {"max_epochs": -1, "max_steps": 21})
    FINITE = (Stream(96), {"max_epochs": 2})
    NO_LIMIT = (Stream(96), {"max_epochs": -1, "max_time": {"seconds": 0}})
    CUT = (Stream(), {"max_epochs": -1, "limit_train_batches": 3})

    @pytest.mark.parametrize(("stream", "arguments"), [ENDLESS, FINITE])
    def test_an_end_in_steps(self, stream, arguments):
        rigl = RigLCallback(0.8, schedule=SCHEDULE)
        watch = Watch(rigl)
        trainer(rigl, watch, **arguments).fit(small(), DataLoader(stream, batch_size=8))
        assert watch.updates == [4, 8, 12, 16, 20]

    @pytest.mark.parametrize(("stream", "arguments"), [FINITE, NO_LIMIT, CUT])
    @pytest.mark.parametrize("begin", [None, 0.1])
    def test_a_fraction(self, stream, arguments, begin):
        rigl, module = RigLCallback(0.8, schedule=UpdateSchedule(every=4, begin=begin)), small()
        before = copies(module.state_dict())
        with pytest.raises(ValueError, match=r"length of training is unknown; give end=<steps>.*max_steps"):
            trainer(rigl, **arguments).fit(module, DataLoader(stream, batch_size=8))
        assert same(before, module.state_dict())
        trainer(rigl, max_epochs=1).fit(module, data())  # nothing of the attempt is left
        assert rigl.sparsifier.timetable.end == 6


class Tunable(Small):
    """What Lightning's searches look for: a learning rate, a batch size, data of its own."""

    def __init__(self, lr=0.1, batch_size=8):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    def train_dataloader(self):
        return data(batch_size=self.batch_size)

    def val_dataloader(self):
        return data(16, batch_size=self.batch_size)


def tunable(**arguments):
    torch.manual_seed(0)
    return Tunable(**arguments)


CALLBACKS = {"rate": lambda: LearningRateFinder(**SEARCH), "size": lambda: BatchSizeFinder(**TRIALS)}


class TestSearches:
    """A search for a learning rate or a batch size runs without the masks, and leaves no trace."""

    def search(self, fit, module, what):
        if what == "rate":
            Tuner(fit).lr_find(module, num_training=20)
        else:
            Tuner(fit).scale_batch_size(module, **TRIALS)

    @pytest.mark.parametrize("what", ["rate", "size"])
    @pytest.mark.parametrize("by", ["tuner", "callback"])
    def test_before_a_fit(self, what, by):
        rigl, module, runs = RigLCallback(0.8, schedule=SCHEDULE), tunable(), []

        def run():
            first = [CALLBACKS[what]()] if by == "callback" else []
            fit = trainer(*first, rigl, FLOPsCallback(), watch := Watch(rigl))
            if by == "tuner":
                self.search(fit, module, what)
            fit.fit(module)
            runs.append(watch)

        rate = "LearningRateFinder searches without other callbacks: its rate is that of the dense model"
        expected = [f"RigLCallback: {rate}."] if (what, by) == ("rate", "callback") else []
        assert said(run) == expected
        assert module.lr != 0.1 if what == "rate" else module.batch_size == 4 * 2
        alone = RigLCallback(0.8, schedule=SCHEDULE)
        watch, unsearched = Watch(alone), tunable(lr=module.lr, batch_size=module.batch_size)
        trainer(alone, watch).fit(unsearched)
        assert same(runs[0].start, watch.start)
        assert runs[0].updates == watch.updates == [*range(4, 30, 4)]
        assert same(module.state_dict(), unsearched.state_dict())
        assert same(rigl.masks, alone.masks)

    @pytest.mark.parametrize("what", ["rate", "size"])
    def test_of_a_sparse_model(self, what):
        rigl, module = RigLCallback(0.8, schedule=SCHEDULE), tunable()
        trainer(rigl, max_epochs=2).fit(module)
        masks, weights = copies(rigl.masks), copies(module.state_dict())
        fit = trainer(rigl, watch := Watch(rigl))
        self.search(fit, module, what)
        assert same(masks, rigl.masks)
        assert same(weights, module.state_dict())
        fit.fit(module)
        assert same(masks, watch.start)
        assert watch.updates == [*range(4, 30, 4)]

    @pytest.mark.parametrize("what", ["rate", "size"])
    def test_that_comes_again_with_a_second_fit(self, what):
        """The schedule has the new length of training, as without a search."""
        rigl, module = RigLCallback(0.8, schedule=UpdateSchedule(every=4, end=0.75)), tunable()
        fit = trainer(CALLBACKS[what](), rigl, watch := Watch(rigl), max_epochs=2)
        fit.fit(module)
        assert watch.updates == [4, 8]
        fit.fit_loop.max_epochs = 5
        fit.fit(module)
        assert rigl.sparsifier.timetable.end == 30
        assert rigl.sparsifier.updates == 2 + 4  # 16 .. 28


class TestASecondFit:
    """The table of that name in docs/how_it_works.md."""

    def fitted(self, end):
        rigl, module = RigLCallback(0.8, schedule=UpdateSchedule(every=4, end=end)), small()
        fit = trainer(rigl, max_epochs=2)
        fit.fit(module, data())
        return rigl, module, fit, rigl.sparsifier.updates, copies(rigl.masks)

    @pytest.mark.parametrize(("end", "first", "second"), [(0.75, 2, 4), (30, 3, 4), (20, 3, 1)])
    def test_same_trainer_same_module(self, end, first, second):
        """Masks continue; the schedule continues, with the new length of training."""
        rigl, module, fit, updates, masks = self.fitted(end)
        fit.fit_loop.max_epochs = 5
        fit.callbacks.append(watch := Watch(rigl))
        fit.fit(module, data())
        assert same(masks, watch.start)
        assert (updates, watch.updates) == (first, [*range(16, 30, 4)][:second])

    @pytest.mark.parametrize("end", [0.75, 30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_new_trainer_same_module(self, end, dtype):
        """Masks continue, also when the parameters have another type by then; the schedule starts anew."""
        rigl, module, _, _, masks = self.fitted(end)
        trainer(rigl, watch := Watch(rigl)).fit(module.to(dtype), data(dtype=dtype))
        assert same(masks, watch.start)
        assert watch.updates == [*range(4, 30, 4)]

    def test_same_module_with_a_layer_of_another_shape(self):
        rigl, module, fit, _, _ = self.fitted(30)
        module.net[2] = nn.Linear(24, 5)
        for again in (fit, trainer(rigl)):
            with pytest.raises(ValueError, match=r"net\.2\.weight is \(4, 24\) in the masks and \(5, 24\)"):
                again.fit(module, data())

    def test_a_new_module(self):
        """Everything anew: the run is that of a new callback, whatever trainer it has."""
        expected, alone = small(seed=7), RigLCallback(0.8, schedule=UpdateSchedule(every=4, end=0.75))
        trainer(alone).fit(expected, data())
        rigl, old, _, _, masks = self.fitted(0.75)
        weights, module = copies(old.state_dict()), small(seed=7)
        trainer(rigl, watch := Watch(rigl)).fit(module, data())
        assert not same(masks, watch.start)
        assert watch.updates == [*range(4, 30, 4)]
        assert same(module.state_dict(), expected.state_dict())
        assert same(rigl.masks, alone.masks)
        assert same(weights, old.state_dict())


def test_a_training_that_is_made_longer_while_it_runs_goes_on():
    class Longer(pl.Callback):
        def on_train_start(self, trainer, module):
            trainer.fit_loop.max_epochs = 6

        def on_train_epoch_end(self, trainer, module):
            norms.append(float(module.net[0].weight.norm()))

    norms = []
    trainer(RigLCallback(0.8), Longer(), max_epochs=3).fit(small(), data())
    assert len(set(norms)) == 6
