"""Updates that read the gradient of batches which nothing else is trained on."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rigl import RigLCallback, RigLSM, UpdateSchedule
from tests.callbacks.flops_problems import Manual, batches, fit
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import Done, StatefulLoader, adamw, run, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:RigLCallback. (training has|no topology update|a topology update)"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path="),
]


def held_out(number=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(number, 8, 16, generator=generator)
    return [(each, each[:, :4].argmax(1)) for each in x]


def sparse(growth_data, every=2, policy="skip_step", **settings):
    schedule = UpdateSchedule(every=every, end=100, policy=policy)
    return RigLCallback(0.8, schedule=schedule, seed=1, growth_data=growth_data, **settings)


@pytest.mark.parametrize("policy", ["skip_step", "after_step"])
def test_the_gradient_is_that_of_the_next_held_out_batch(policy, monkeypatch):
    seen, known = [], held_out()

    class Watch(Small):
        def on_before_optimizer_step(self, optimizer):
            layers = rigl.sparsifier.layers  # this hook of the module follows that of the callbacks
            self.before = {name: layer.parameter.detach().clone() for name, layer in layers.items()}

    rigl = sparse(known, policy=policy)
    original = type(rigl._held_out).keep

    def keep(self, trainer, module, sparsifier):
        original(self, trainer, module, sparsifier)
        x, y = known[len(seen) % 3]
        parameters = dict(module.named_parameters())
        loss = nn.functional.cross_entropy(module(x), y)
        expected = torch.autograd.grad(loss, [parameters[name] for name in sparsifier.layers])
        for layer, grad in zip(sparsifier.layers.values(), expected, strict=True):
            assert torch.equal(layer.chooses, grad)
            assert not torch.equal(layer.parameter.grad, grad)
        seen.append(len(seen))

    monkeypatch.setattr(type(rigl._held_out), "keep", keep)
    fit(rigl, module=Watch(), sizes=[8] * 9)
    assert len(seen) == rigl.sparsifier.updates == 4


def test_module_and_random_numbers_are_left_alone_but_for_the_topology():
    class Noisy(Small):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Linear(24, 4))

    states = []
    for growth in (None, held_out()):
        torch.manual_seed(0)
        module = Noisy()
        rigl = sparse(growth, every=3)
        fit(rigl, module=module, sizes=[8] * 4)
        states.append((torch.get_rng_state(), {k: v.clone() for k, v in module.named_buffers()}))
    assert torch.equal(states[0][0], states[1][0])
    assert all(torch.equal(states[0][1][k], states[1][1][k]) for k in ("net.1.num_batches_tracked",))


def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path):
    def go(ckpt=None, epochs=2):
        rigl = sparse(held_out(), every=3)
        return rigl, fit(rigl, module=small(), loader=StatefulLoader(), ckpt=ckpt, max_epochs=epochs)

    straight, _ = go()
    _, first = go(epochs=1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    again, _ = go(ckpt=tmp_path / "one.ckpt")
    assert all(torch.equal(again.masks[name], mask) for name, mask in straight.masks.items())
    plain = RigLCallback(0.8, schedule=UpdateSchedule(every=3, end=100), seed=1)
    fit(plain, module=small(), loader=StatefulLoader(), max_epochs=2)
    assert any(not torch.equal(plain.masks[name], mask) for name, mask in straight.masks.items())


def test_what_cannot_read_it_is_refused():
    with pytest.raises(ValueError, match="growth_data: SET does not read the gradient at updates"):
        RigLCallback(method="set", growth_data=held_out())
    with pytest.raises(MisconfigurationException, match="growth_data needs the loss of a training_step"):
        fit(sparse(held_out()), module=Manual(), loader=DataLoader(list(batches(8, 8, 8)), batch_size=None))


def test_a_loader_is_such_data():
    rigl = sparse(data())
    fit(rigl, sizes=[8] * 5)
    assert rigl.sparsifier.updates == 2


@pytest.mark.parametrize("bad", [0, 2])
def test_a_postponed_update_takes_the_next_batch(bad, monkeypatch):
    """One batch without a finite gradient, of three, must not stop the topology."""
    known, taken = held_out(), []
    known[bad][0].fill_(torch.nan)
    rigl = sparse(known)
    original = type(rigl._held_out).keep

    def keep(self, trainer, module, sparsifier):
        original(self, trainer, module, sparsifier)
        taken.append(next(i for i, batch in enumerate(known) if batch is self._batch))

    monkeypatch.setattr(type(rigl._held_out), "keep", keep)
    with pytest.warns(UserWarning, match="a gradient was not finite"):
        fit(rigl, sizes=[8] * 9)
    steps = {0: [2, 3, 4, 6, 7, 8], 2: [2, 4, 6, 7, 8]}[bad]  # one more after the bad batch, in both passes
    assert taken == [i % 3 for i in range(len(steps))]
    assert rigl.sparsifier.updates == 4


class InterruptionError(Exception):
    pass


class Interrupt(pl.Callback):
    def __init__(self, step, place):
        def fail(trainer, *_):
            if trainer.global_step == step:
                raise InterruptionError

        setattr(self, place, fail)


@pytest.mark.parametrize("place", ["on_before_zero_grad", "on_before_optimizer_step"])
@pytest.mark.parametrize("step", range(2, 6))
def test_a_run_with_postponed_updates_is_resumed_exactly(step, place, tmp_path):
    """Also from inside a step that had taken its batch, and was not done."""
    known = held_out()
    known[0][0].fill_(torch.nan)
    known[2][0].fill_(torch.nan)
    straight = run(tmp_path, sparse(known))
    loader = StatefulLoader(replay=True)
    stop = [Done(loader), sparse(known), Interrupt(step, place), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(InterruptionError):
        trainer(*stop, max_epochs=2, enable_checkpointing=True).fit(small(optimizer=adamw), loader)
    loader = StatefulLoader(replay=True)
    rescued = tmp_path / "on_exception.ckpt"
    again = run(tmp_path / "again", Done(loader), sparse(known), loader=loader, resume=rescued)
    assert straight["sparsity"]["numbers"]["growth_data"]["taken"] > straight["sparsity"]["updates"]
    assert same(straight, again)


def test_a_state_of_before_batches_were_counted_goes_on_after_those_of_its_updates(tmp_path):
    rigl, known = sparse(held_out()), held_out()
    fit(rigl, sizes=[8] * 6).save_checkpoint(tmp_path / "old.ckpt")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)
    saved["callbacks"]["RigLCallback"]["numbers"].clear()
    torch.save(saved, tmp_path / "old.ckpt")
    again = sparse(known)
    fit(again, sizes=[8] * 7, max_epochs=2, ckpt=tmp_path / "old.ckpt")
    assert again._held_out._batch is known[(again.sparsifier.updates - 1) % 3]


def test_a_new_model_begins_with_the_first_batch_and_a_second_fit_goes_on():
    known = held_out()
    rigl, module = sparse(known), small()
    fit(rigl, module=module, sizes=[8] * 5)
    assert rigl._held_out._batch is known[1]
    fit(rigl, module=module, sizes=[8] * 3)  # its first update is due at the step of the last one before
    assert rigl._held_out._batch is known[2]
    fit(rigl, module=small(), sizes=[8] * 3)
    assert rigl._held_out._batch is known[0]


class Once:
    """Gives its batches in the first pass only."""

    def __init__(self):
        self.batches = iter(held_out())

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("data", "steps"), [(DataLoader(TensorDataset(torch.zeros(0, 16)), batch_size=4), 3), (Once(), 9)]
)
def test_a_pass_without_a_batch_ends_the_run_in_words(data, steps):
    with pytest.raises(
        ValueError, match=r"growth_data: a pass over this \w+ gives no batch; give a loader or"
    ):
        fit(sparse(data), sizes=[8] * steps)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("abc", TypeError, "growth_data: batches, such as a loader or a list of them, got 'abc'"),
        (5, TypeError, "growth_data: batches, such as a loader or a list of them, got 5"),
        (iter(held_out()), TypeError, r"growth_data: a list_iterator can be read once, .* or list\(...\)"),
        ((x for x in held_out()), TypeError, "growth_data: a generator can be read once"),
        (zip(held_out()), TypeError, "growth_data: a zip can be read once"),
        ([], ValueError, r"growth_data: there is no batch in \[\]"),
    ],
)
def test_what_gives_no_batches_over_and_over_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        sparse(data)


def test_batches_by_index_will_do():
    class Batches:
        def __getitem__(self, index):
            return held_out()[index]

    rigl = sparse(Batches())
    fit(rigl, sizes=[8] * 9)
    assert rigl.sparsifier.updates == 4


def test_the_copy_knows_the_time_of_the_update():
    seen = []

    class Watch(Small):
        def training_step(self, batch, batch_idx):
            if self._trainer is None:
                seen.append((self.current_epoch, self.global_step))
            return super().training_step(batch, batch_idx)

    fit(sparse(held_out(), every=3), module=Watch(), sizes=[8] * 4, max_epochs=2)
    assert seen == [(0, 3), (1, 6)]


@pytest.mark.parametrize("policy", ["skip_step", "after_step"])
def test_a_method_that_observes_sees_the_gradients_of_training_only(policy, monkeypatch):
    """The held-out batch has inputs a thousand times as large; RigL-SM averages the training gradients."""
    seen, observe = [], RigLSM.observe

    def watch(self, layer, moment):
        seen.append(float(layer.grad.abs().max()))
        observe(self, layer, moment)

    monkeypatch.setattr(RigLSM, "observe", watch)
    known = [(1000 * x, y) for x, y in held_out()]
    rigl = sparse(known, policy=policy, method="riglsm")
    fit(rigl, sizes=[8] * 6)
    assert rigl.sparsifier.updates == 2
    assert max(seen) < 10 * min(seen)
