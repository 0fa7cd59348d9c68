"""Updates that read the gradient of batches which nothing else is trained on."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_rigl import RigLCallback, UpdateSchedule
from tests.callbacks.flops_problems import Manual, batches, fit
from tests.callbacks.problems import Small, data, small
from tests.callbacks.stateful_loader import StatefulLoader

pytestmark = pytest.mark.filterwarnings("ignore:RigLCallback. (training has|no topology update)")


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
            assert torch.equal(layer.gradient, grad)
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
    def run(ckpt=None, epochs=2):
        rigl = sparse(held_out(), every=3)
        trainer = fit(rigl, module=small(), loader=StatefulLoader(), ckpt=ckpt, max_epochs=epochs)
        return rigl, trainer

    straight, _ = run()
    _, trainer = run(epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again, _ = run(ckpt=tmp_path / "one.ckpt")
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


def test_a_postponed_update_keeps_its_batch(monkeypatch):
    known, taken = held_out(), []
    rigl = sparse(known)
    original = type(rigl._held_out).keep

    def keep(self, trainer, module, sparsifier):
        original(self, trainer, module, sparsifier)
        taken.append(next(i for i, batch in enumerate(known) if batch is self._next[1]))
        if trainer.global_step == 2:
            for layer in sparsifier.layers.values():
                layer.kept.fill_(float("nan"))

    monkeypatch.setattr(type(rigl._held_out), "keep", keep)
    fit(rigl, sizes=[8] * 6)
    assert taken == [0, 0, 1]


def test_the_copy_knows_the_time_of_the_update():
    seen = []

    class Watch(Small):
        def training_step(self, batch, batch_idx):
            if self._trainer is None:
                seen.append((self.current_epoch, self.global_step))
            return super().training_step(batch, batch_idx)

    fit(sparse(held_out(), every=3), module=Watch(), sizes=[8] * 4, max_epochs=2)
    assert seen == [(0, 3), (1, 6)]
