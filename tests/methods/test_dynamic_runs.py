"""Whole runs: exact totals, resume, a Trainer; and defects of published systems that must not come back."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.methods.deepr import DeepR
from lightning_rigl.methods.dsr import DSR
from lightning_rigl.methods.rigl_inverted import RigLInverted
from lightning_rigl.methods.rigl_sg import RigLSG
from lightning_rigl.methods.rigl_sm import RigLSM
from lightning_rigl.methods.snfs import SNFS
from lightning_rigl.methods.snfs_original import SNFSOriginal
from lightning_rigl.topology.redistribution import redistributed
from tests.callbacks.problems import data, small, trainer
from tests.model.problems import batches, network

METHODS = [SNFS(), SNFSOriginal(), RigLSG(), RigLSM(), RigLInverted(), DSR(0.05), DeepR(1e-3, 1e-5)]
SHARED = (SNFSOriginal, RigLSG, RigLSM, DSR)  # the total is constant, a layer's count is not
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


class Run:
    """A small network, its optimizer and its sparsifier, in a plain loop."""

    def __init__(self, method, schedule, sparsity=0.7, optimizer=None, steps=400, device="cpu"):
        self.device, self.model = device, network(device=device)
        make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
        self.sparsifier = Sparsifier(self.model, sparsity, method, schedule=schedule, seed=3)
        self.sparsifier.start(total_steps=steps)
        self.optimizer = make(self.model.parameters())

    def train(self, first, last, grad=None, after=lambda: None):
        data = batches(last, device=self.device)
        for step in range(first, last):
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(data[step][0]), data[step][1]).backward()
            if grad:
                grad(step, self.model)
            self.sparsifier.before_step(self.optimizer, step)
            self.optimizer.step()
            self.sparsifier.after_step()
            after()
        return self

    def state(self):
        parts = self.model.state_dict(), self.optimizer.state_dict(), self.sparsifier.state_dict()
        file = io.BytesIO()
        torch.save(parts, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        self.sparsifier.load_state_dict(state[2])


def frequent(method, every=2):
    """The method's own schedule, with more updates."""
    own = method.schedule
    every = 1 if own.policy == "after_step" else every
    return UpdateSchedule(every, own.drop_fraction, "constant", begin=0, end=1.0, policy=own.policy)


@each_method
def test_the_total_is_exact_over_two_hundred_updates(method):
    run = Run(method, frequent(method))
    first, seen = dict(run.sparsifier.counts), []

    def check():
        sparsifier = run.sparsifier
        seen.append(tuple(sparsifier.counts.values()))
        for name, mask in sparsifier.masks.items() if len(seen) % 10 == 0 else ():
            assert int(mask.sum()) == sparsifier.counts[name] >= 1
            assert (sparsifier.parameters[name][~mask] == 0).all()

    run.train(0, 400 if method.schedule.policy == "skip_step" else 200, after=check)
    assert run.sparsifier.updates == 200
    assert {sum(counts) for counts in seen} == {sum(first.values())}
    assert (len(set(seen)) > 1) == isinstance(method, SHARED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_method
def test_the_total_is_exact_on_a_gpu(method):
    run = Run(method, frequent(method), device="cuda")
    total = sum(run.sparsifier.counts.values())
    run.train(0, 40)
    assert sum(run.sparsifier.counts.values()) == total
    assert sum(int(mask.sum()) for mask in run.sparsifier.masks.values()) == total
    assert all(note.is_cuda for layer in run.sparsifier.layers.values() for note in layer.notes.values())


@each_method
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_resume_is_bitwise(method, optimizer_name):
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    }[optimizer_name]
    schedule = UpdateSchedule(5, method.schedule.drop_fraction, begin=0, policy=method.schedule.policy)
    schedule = method.schedule if isinstance(method, DeepR) else schedule
    straight = Run(method, schedule, optimizer=make, steps=60).train(0, 60)
    first = Run(method, schedule, optimizer=make, steps=60).train(0, 33)
    state = first.state()
    first.train(33, 40)  # what goes on must not change what was saved
    second = Run(method, schedule, optimizer=make, steps=60)
    second.load(state)
    second.train(33, 60)
    assert same(straight.state(), second.state())
    if isinstance(method, DSR):
        assert next(iter(state[2]["numbers"].values()))["threshold"] != method.threshold
    if method.has("observe"):
        assert state[2]["notes"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@each_method
def test_a_trainer(method):
    own = method.schedule
    schedule = None if isinstance(method, DeepR) else UpdateSchedule(4, own.drop_fraction, policy=own.policy)
    module, callback = small(), RigLCallback(0.8, method, schedule=schedule, seed=1)
    trainer(callback).fit(module, data())
    sparsifier = callback.sparsifier
    assert sparsifier.updates == (40 if isinstance(method, DeepR) else 7)
    assert sum(sparsifier.counts.values()) == sum(layer.target for layer in sparsifier.layers.values())
    for name, mask in callback.masks.items():
        assert (sparsifier.parameters[name][~mask] == 0).all()


@each_method
def test_the_global_generator_is_not_touched_and_a_run_repeats(method):
    state = torch.random.get_rng_state()
    first = Run(method, frequent(method))  # building the network seeds it
    state = torch.random.get_rng_state()
    first.train(0, 40)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(first.state(), Run(method, frequent(method)).train(0, 40).state())


@each_method
def test_short_names(method):
    assert type(Method.of(type(method).__name__.lower())) is type(method)


@pytest.mark.parametrize(
    ("name", "gradient", "scope", "policy"),
    [
        ("snfs", "every_step", "layer", "skip_step"),  # 2 f_S + f_D
        ("snfsoriginal", "every_step", "model", "after_step"),
        ("riglsg", "at_updates", "model", "skip_step"),
        ("riglsm", "at_updates", "model", "skip_step"),
        ("riglinverted", "at_updates", "layer", "skip_step"),
        ("dsr", "never", "model", "after_step"),  # 3 f_S
        ("deepr", "never", "layer", "after_step"),
    ],
)
def test_what_each_declares_decides_its_cost(name, gradient, scope, policy):
    method = Method.of(name)
    assert (method.gradient, method.scope, method.schedule.policy) == (gradient, scope, policy)
    assert not method.starts_dense
    assert not method.latent


# --- Defects of published systems ---


@pytest.mark.parametrize("method", [SNFSOriginal(), RigLSG(), RigLSM()], ids=lambda m: type(m).__name__)
def test_a_dense_layer_does_not_lose_the_values_it_drops_and_grows_again(method):
    """The reproducibility library drops in a dense layer of small share; what it grows again is zero."""
    assert redistributed([192, 128], [192, 128], [3.0, 1.0], 0.5) == [(0, 0), (64, 64)]
    assert redistributed([192, 128], [192, 128], [1.0, 3.0], 0.5) == [(96, 96), (0, 0)]
    schedule = UpdateSchedule(1000, 0.5, begin=20, end=1.0)
    run = Run(method, schedule, sparsity={"^0": 0.0, "^2": 0.0}, steps=2000).train(0, 20)
    before = {name: p.detach().clone() for name, p in run.sparsifier.parameters.items()}
    run.train(20, 21)
    assert run.sparsifier.updates == 1
    for name, value in before.items():
        assert torch.equal(run.sparsifier.parameters[name], value)


@each_method
def test_ties_leak_no_count(method):
    """Strict thresholds lose or double what ties: here all weights are equal and all gradients zero."""
    run = Run(method, frequent(method, every=1), optimizer=lambda p: torch.optim.SGD(p, 0.1))
    total = sum(run.sparsifier.counts.values())

    def tie(step, model):
        for p in model.parameters():
            p.grad.zero_()

    with torch.no_grad():
        for layer in run.sparsifier.layers.values():
            layer.parameter.copy_(layer.mask.float() * 0.01)
    run.train(0, 10, grad=tie)
    assert sum(run.sparsifier.counts.values()) == total
    assert sum(int(mask.sum()) for mask in run.sparsifier.masks.values()) == total


@pytest.mark.parametrize(
    "method", [SNFSOriginal(), RigLSG(), RigLSM(), DSR(1e3)], ids=lambda m: type(m).__name__
)
def test_no_layer_is_emptied_whatever_is_asked(method):
    own = method.schedule
    run = Run(method, UpdateSchedule(1, 1.0, "constant", begin=0, end=1.0, policy=own.policy), sparsity=0.9)
    total = sum(run.sparsifier.counts.values())
    for step in range(5):
        run.train(step, step + 1)
        assert min(run.sparsifier.counts.values()) >= 1
        assert sum(run.sparsifier.counts.values()) == total


@pytest.mark.parametrize("method", [SNFS(), SNFSOriginal(), RigLSM()], ids=lambda m: type(m).__name__)
def test_an_overflow_does_not_stay_in_the_average(method):
    run = Run(method, UpdateSchedule(10, begin=10, end=1.0, policy=method.schedule.policy))

    clean = run.train(0, 5).sparsifier.layers["0.weight"].notes["momentum"].clone()
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    run.sparsifier.before_step(run.optimizer, 5)  # a scaler would now leave the step out
    assert torch.equal(run.sparsifier.layers["0.weight"].notes["momentum"], clean)


def test_rigl_sm_hears_nothing_of_inactive_connections_not_even_a_nan():
    mask = torch.tensor([True, False])
    notes = {}
    for inactive in (float("nan"), 1e30):
        grad = torch.tensor([1.0, inactive])
        RigLSM(0.5).observe(Connections(mask.float(), mask, grad, torch.Generator(), notes=notes), Moment(0))
    assert notes["momentum"].tolist() == [0.75, 0.0]


@each_method
def test_a_layer_without_a_gradient_keeps_its_mask(method):
    run = Run(method, frequent(method))
    idle = nn.Parameter(torch.randn(6, 6))
    run.model.register_parameter("idle", idle)
    sparsifier = Sparsifier(
        run.model,
        {"idle": 0.5, ".": 0.7},
        method,
        schedule=frequent(method),
        include=["weight", "idle"],
        seed=3,
    )
    sparsifier.start(total_steps=40)
    optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
    before, total = sparsifier.masks["idle"].clone(), sum(sparsifier.counts.values())
    for step, (x, y) in enumerate(batches(20)):
        optimizer.zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    assert sum(sparsifier.counts.values()) == total
    if method.gradient != "never":
        assert torch.equal(sparsifier.masks["idle"], before)


@each_method
def test_what_is_saved_in_memory_does_not_change_later(method):
    run = Run(method, frequent(method)).train(0, 20)
    saved = run.sparsifier.state_dict()
    before = copy.deepcopy((saved["notes"], saved["numbers"]))
    run.train(20, 30)
    assert same((saved["notes"], saved["numbers"]), before)
