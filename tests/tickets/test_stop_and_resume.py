"""The same call goes on where it was stopped, and ends as an undisturbed one does, bit by bit."""

import multiprocessing
import random
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from lightning_rigl.tickets import recorder
from tests.callbacks.stateful_loader import StatefulLoader, same
from tests.tickets.problems import Net, Seeds, Trainers, end, loader, tickets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*is about to resume|.*resuming from a checkpoint that ended before"),
]
REWINDS = ["init", 5, "learning_rate"]


class StoppedError(Exception):
    pass


class Stop(pl.Callback):
    """Ends the training in one round, at one step or epoch, in one hook."""

    def __init__(self, index, hook, when):
        self.index, self.when, self.trainers = index, when, 0
        setattr(self, hook, self.maybe)

    def setup(self, trainer, module, stage):
        self.trainers += 1

    def maybe(self, trainer, module, *_):
        now = trainer.global_step
        if self.trainers == self.index + 1 and self.when in (now, None):
            raise StoppedError


def other_seeds():
    """A new program: networks with other first weights."""
    seeds = Seeds()
    seeds.made = 50
    return seeds


@pytest.fixture(scope="module", params=REWINDS)
def undisturbed(request, tmp_path_factory):
    done = tickets(tmp_path_factory.mktemp("straight"), rewind=request.param).run(loader())
    return request.param, [end(ticket) for ticket in done]


PLACES = [
    (0, "on_train_batch_end", 2),  # nothing is saved but the first state
    (0, "on_train_batch_end", 5),  # at step k
    (0, "on_train_batch_end", 6),
    (0, "on_train_epoch_end", 8),
    (1, "on_train_batch_start", 5),
    (1, "on_train_batch_end", 7),
    (1, "on_train_batch_end", 11),
    (1, "on_train_epoch_end", 8),
    (1, "on_train_epoch_end", 12),
    (1, "on_train_end", None),
    (1, "on_fit_end", None),
    (2, "setup", None),
    (2, "on_train_batch_end", 10),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_exception_inside_a_round(place, undisturbed):
    rewind, straight = undisturbed
    index, hook, when = place
    stop = Stop(*place) if hook != "setup" else Stop(index, "on_fit_start", when)
    with pytest.raises(StoppedError):
        tickets(trainer=Trainers(stop), rewind=rewind).run(loader())
    again = tickets(model=other_seeds(), rewind=rewind)
    assert len(again.tickets) == index + (hook == "on_fit_end")
    assert same(straight, [end(ticket) for ticket in again.run(loader())])


def test_what_is_done_is_not_done_again():
    trainers = Trainers(Stop(1, "on_train_batch_end", 6))
    with pytest.raises(StoppedError):
        tickets(trainer=trainers).run(loader())
    trainers = Trainers()
    tickets(model=other_seeds(), trainer=trainers).run(loader())
    assert [len(watch.rates) for watch in trainers.watches] == [8, 12]  # round 1 from its first epoch's end
    trainers = Trainers()
    assert len(tickets(trainer=trainers).run(loader())) == 3
    assert not trainers.watches


def test_an_exception_between_two_rounds():
    straight = [end(ticket) for ticket in tickets("straight").run(loader())]

    def fails():
        raise StoppedError

    seeds = iter([Seeds(), fails])
    with pytest.raises(StoppedError):
        tickets(model=lambda: next(seeds)()).run(loader())
    assert same(straight, [end(ticket) for ticket in tickets(model=other_seeds()).run(loader())])


@pytest.mark.parametrize("file", ["end.json", "tickets.json"])
def test_an_exception_between_two_files(file, monkeypatch):
    straight = [end(ticket) for ticket in tickets("straight").run(loader())]
    write = recorder.write_json

    def fails(content, path):
        if path.name == file and (file == "tickets.json" or "round-01" in str(path)):
            raise StoppedError
        write(content, path)

    monkeypatch.setattr(recorder, "write_json", fails)
    with pytest.raises(StoppedError):
        tickets().run(loader())
    monkeypatch.setattr(recorder, "write_json", write)
    model = other_seeds() if file == "end.json" else None
    assert same(straight, [end(ticket) for ticket in tickets(model=model).run(loader())])


@pytest.mark.parametrize("rewind", REWINDS)
@pytest.mark.parametrize("steps", [4, 9])
def test_checkpoints_inside_an_epoch(steps, rewind):
    """Of seven batches, with a loader that has a state; an epoch's metrics are left to Lightning."""

    def ends(done):
        return [{**end(ticket), "metrics": None} for ticket in done]

    straight = ends(tickets("straight", rewind=rewind).run(StatefulLoader()))
    for index, when in ((0, 11), (1, 6), (1, 20), (2, 16)):
        folder = f"{index} {when}"
        stop = Trainers(Stop(index, "on_train_batch_end", when))
        with pytest.raises(StoppedError):
            tickets(folder, trainer=stop, rewind=rewind, save_every=steps).run(StatefulLoader())
        trainers = Trainers()
        settings = {"model": other_seeds(), "trainer": trainers, "rewind": rewind, "save_every": steps}
        assert same(straight, ends(tickets(folder, **settings).run(StatefulLoader())))
        begun = 5 if index and rewind == 5 else 0
        assert trainers.watches[0].start["step"] == begun + (when - begun - 1) // steps * steps


@pytest.mark.parametrize("save_every", [None, 1, 3])
@pytest.mark.parametrize("settings", [{"max_steps": 14}, {"max_steps": 16}, {"max_epochs": 2}], ids=str)
@pytest.mark.parametrize("when", [6, 9, None])
def test_however_the_length_is_given(when, settings, save_every):
    """Stopped in an epoch, in the next one, at the very end: what is saved has something left to train."""
    trainers = [Trainers(**settings) for _ in range(2)]
    straight = tickets("straight", trainer=trainers[0]).run(StatefulLoader())
    stop = Stop(1, "on_train_batch_end" if when else "on_train_end", when)
    with pytest.raises(StoppedError):
        tickets(trainer=Trainers(stop, **settings), save_every=save_every).run(StatefulLoader())
    again = tickets("tickets", other_seeds(), trainers[1], save_every=save_every)
    done = again.run(StatefulLoader())
    for ticket, other in zip(straight, done, strict=True):
        assert same({**end(ticket), "metrics": None}, {**end(other), "metrics": None})
        assert ticket.metrics.keys() == other.metrics.keys()
    assert [t.steps for t in done] == [settings.get("max_steps", 14)] * 3


class ByEpoch(Sampler):
    """Another order in each epoch, as a distributed sampler draws it."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 32

    def __iter__(self):
        return iter(torch.randperm(32, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Validated(Net):
    """It counts the epochs that it begins, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("begun", torch.zeros(()))

    def on_train_epoch_start(self):
        self.begun += 1

    def validation_step(self, batch, batch_idx):
        self.log("validation", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


STOPS = [
    (4, None, [9]),
    (4, 4, [10]),
    (4, 2, [9, 17]),
    (8, 8, [17]),
    (6, 4, [11]),
    ("init", 4, [5, 9, 17]),
    ("init", None, [5, 9, 13]),
]


@pytest.mark.parametrize(("rewind", "save_every", "stops"), STOPS, ids=str)
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    "length",
    [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 20}, {"max_epochs": 5, "max_steps": 20}],
    ids=str,
)
def test_stops_where_an_epoch_ends(rewind, save_every, stops, validation, length):
    """Step k there, checkpoints there, up to three of them in one round, and the order of each epoch."""

    def run(folder, *callbacks):
        data = DataLoader(loader().dataset, batch_size=8, sampler=ByEpoch())
        held_out = loader() if validation else None
        settings = {"trainer": Trainers(*callbacks, **length), "rounds": 1, "rewind": rewind}
        return tickets(folder, Validated, save_every=save_every, **settings).run(data, held_out)

    torch.manual_seed(5)
    straight = run("straight")
    torch.manual_seed(5)
    for count, when in enumerate(stops):
        with pytest.raises(StoppedError):
            run("tickets", Stop(0 if count else 1, "on_train_batch_end", when))
    done = run("tickets")
    begun = 0 if rewind == "init" else rewind
    assert [t.steps for t in done] == [t.steps for t in straight] == [20, 20 - begun]
    assert [end(t)["state_dict"]["begun"] for t in done] == [5, 5]
    if (rewind, save_every) != (6, 4):  # inside an epoch the pass of such a loader starts anew
        assert same([end(t) for t in straight], [end(t) for t in done])


def test_more_rounds_later():
    straight = [end(ticket) for ticket in tickets("straight", rounds=3).run(loader())]
    tickets(rounds=1).run(loader())
    assert same(straight, [end(ticket) for ticket in tickets(model=other_seeds(), rounds=3).run(loader())])


class Slow(pl.Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.003)


def train(rewind):
    tickets(trainer=Trainers(Slow()), rewind=rewind).run(loader())


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 20))]
)
def test_kill_9_at_any_moment(seed, undisturbed):
    """Twice; every file that is there is whole."""
    rewind, straight = undisturbed
    dice = random.Random(f"{seed} {rewind}")
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=train, args=(rewind,))
        child.start()
        child.join(dice.uniform(0.05, 0.4))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    assert same(straight, [end(t) for t in tickets(rewind=rewind).run(loader())])
