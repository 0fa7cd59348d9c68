import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from lightning_rigl.export import advice as module
from lightning_rigl.export.advice import advise
from lightning_rigl.export.agreement import compare
from lightning_rigl.export.rounds import FEWEST, rounds, timings
from lightning_rigl.export.sparse_model import sparse

NAMES = ["dense", "dense compiled", "compacted", "sparse torch", "sparse native", "compacted and sparse"]


class Slow(nn.Module):
    """Takes so many seconds of a clock that only it moves."""

    def __init__(self, net, clock, seconds):
        super().__init__()
        self.net, self.clock, self.seconds = net, clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds
        return self.net(x)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "rounds", lambda runs, seconds: rounds(runs, seconds, clock))
    return clock


@pytest.fixture
def forms(monkeypatch, clock):
    """Every variant is the model itself, as slow as is said; those not named are not to be had."""

    def set_forms(**seconds):
        def form(name, model):
            if name not in seconds:
                raise RuntimeError(f"no {name} here\nand more lines")
            return Slow(model.net, clock, seconds[name])

        def either(dense, backend):
            return form(f"{backend}_of_small" if getattr(dense, "small", False) else backend, dense)

        def small(dense, example):
            found = form("compacted", dense)
            found.small = True
            return found

        monkeypatch.setattr(module, "_compiled", lambda dense: form("compiled", dense))
        monkeypatch.setattr(module, "_compacted", small)
        monkeypatch.setattr(module, "_sparse", either)
        return Slow(nn.Linear(3, 2), clock, seconds["dense"]), torch.randn(4, 3)

    return set_forms


def cells(advice):
    return {row[0]: row[1:] for row in advice.table().rows}


def test_the_table_by_a_fake_clock(forms):
    model, x = forms(
        dense=0.012, compiled=0.008, compacted=0.006, torch=0.004, native=0.002, auto_of_small=0.001
    )
    advice = advise(model, x, seconds=1.0)
    lines = str(advice).splitlines()
    assert lines[0].startswith("inference on the example, measured on the CPU with ")
    assert lines[1].split("  ")[-2:] == ["times as fast", "largest difference"]
    assert lines[-1].strip() == "best: compacted and sparse"
    assert cells(advice) == {
        "dense": ("12.000", "1.00x", "0"),
        "dense compiled": ("8.000", "1.50x", "0"),
        "compacted": ("6.000", "2.00x", "0"),
        "sparse torch": ("4.000", "3.00x", "0"),
        "sparse native": ("2.000", "6.00x", "0"),
        "compacted and sparse": ("1.000", "12.00x", "0"),
    }
    assert advice.best == "compacted and sparse"
    assert advice.model.seconds == 0.001


def test_what_is_not_to_be_had_is_said_and_not_recommended(forms):
    advice = advise(*forms(dense=0.012, torch=0.004))
    assert [v.name for v in advice.variants] == NAMES
    assert advice.best == "sparse torch"
    assert cells(advice)["sparse native"] == ("not measured", "", "")
    lines = str(advice).splitlines()
    assert "dense compiled: not possible, RuntimeError: no compiled here" in lines
    assert "compacted and sparse: not possible, RuntimeError: no compacted here" in lines
    assert not any("more lines" in line for line in lines)


@pytest.mark.parametrize("fast", [0.01, 0.0098, 0.02])
def test_within_the_margin_dense_is_best(forms, fast):
    advice = advise(*forms(dense=0.01, torch=fast, native=fast))
    assert advice.best == "dense"
    assert advice.model.seconds == 0.01
    assert not advice.model.training


def test_a_gain_that_is_not_there_in_most_rounds_is_noise():
    steady = timings({"dense": [1.0] * 8, "fast": [0.5] * 8})["fast"]
    noisy = timings({"dense": [1.0] * 8, "fast": [0.5, 1.2, 0.5, 1.2, 0.5, 1.2, 0.5, 0.5]})["fast"]
    assert steady.ratio == noisy.ratio == 2.0
    assert steady.low > 1 + module.MARGIN > noisy.low


def test_ratios_are_taken_within_a_round():
    load = [1.0, 1.0, 8.0, 8.0, 2.0]  # of the machine: it slows both
    found = timings({"dense": [2 * x for x in load], "fast": load})["fast"]
    assert (found.ratio, found.low, found.seconds) == (2.0, 2.0, 2.0)


def test_every_round_runs_each_variant_once_and_turns_round():
    order, ticks = [], itertools.count()
    runs = {name: lambda name=name: lambda: order.append(name) for name in "abc"}
    times = rounds(runs, 0.0, lambda: next(ticks))
    assert "".join(order) == ("abccba" * FEWEST)[: 3 * FEWEST]
    assert {len(own) for own in times.values()} == {FEWEST}
    assert len(rounds(runs, 200.0, lambda: next(ticks))["a"]) > FEWEST


def test_a_wrong_variant_is_never_recommended(forms, monkeypatch):
    model, x = forms(dense=0.012, torch=0.004, native=0.001)
    right = module._sparse

    def wrong(dense, backend):
        found = copy.deepcopy(right(dense, backend))
        if backend == "native":
            found.net.weight.data += 0.01
        return found

    monkeypatch.setattr(module, "_sparse", wrong)
    advice = advise(model, x)
    assert advice.best == "sparse torch"
    native = next(v for v in advice.variants if v.name == "sparse native")
    assert native.timing is None
    assert native.difference > 1e-3
    assert "wrong: its outputs differ from the dense ones by 0.0" in str(advice)


def test_a_variant_that_fails_on_the_example_is_listed(forms, monkeypatch):
    model, x = forms(dense=0.012)
    monkeypatch.setattr(module, "_sparse", lambda dense, backend: nn.Linear(7, 2))
    assert "sparse torch: not possible, RuntimeError: mat1 and mat2" in str(advise(model, x))


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        ([1.0, 100.0], [1.001, 100.0], True),
        ([1.0, 1.0], [1.001, 1.0], False),
        ([1e-6, 1e-6], [1e-6, 2e-6], False),
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan"), 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [float("nan"), 1.0], False),
        ([float("inf"), 1.0], [float("inf"), 1.0], True),
        ([float("inf"), 1.0], [1.0, 1.0], False),
        ([0.0], [0.0], True),
        ([1.0], [1.0, 1.0], False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 3], False),
        ([], [], True),
    ],
)
def test_what_rounding_is(expected, got, right):
    assert compare(torch.tensor(expected), torch.tensor(got))[1] is right
    assert compare({"a": torch.tensor(expected)}, {"a": torch.tensor(got)})[1] is right


def test_outputs_of_another_form_are_wrong():
    x = torch.ones(2)
    assert not compare((x, x), (x,))[1]
    assert not compare(x, x.double())[1]
    assert not compare(x, None)[1]
    assert compare({"a": (x, None)}, {"a": (x, None)})[1]


def sparse_mlp():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    net[0].weight.data.mul_(torch.rand(512, 512) < 0.02)
    net[0].weight.data[:100] = 0
    return net


def test_a_real_model_is_left_as_it_is_and_the_advised_one_is_right():
    net, x = sparse_mlp().train(), torch.randn(16, 512)
    before = copy.deepcopy(net.state_dict())
    advice = advise(net, x, seconds=0.2, compile=False)
    assert [v.name for v in advice.variants] == [n for n in NAMES if n != "dense compiled"]
    assert net.training
    assert all(t.equal(before[name]) for name, t in net.state_dict().items())
    torch.testing.assert_close(advice.model(x), net(x), rtol=1e-4, atol=1e-5)
    timed = {v.name: v for v in advice.variants if v.timing is not None}
    assert {"dense", "compacted"} <= timed.keys()
    assert all(v.difference < 1e-5 for v in timed.values())
    if not torch.backends.mkl.is_available():
        pytest.skip("torch's sparse products need MKL")
    assert "sparse torch" in timed


def test_a_model_that_writes_to_its_input_and_takes_two():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.fc(x.mul_(2) + y)

    x, y = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4)
    advice = advise(Two(), (x, y), seconds=0.05, compile=False)
    assert x.detach().equal(y)
    assert advice.best == "dense"
    assert "sparse torch: no layer can skip its zeros with a gain: too dense or too small to gain" in str(
        advice
    )
    assert "there is nothing to remove" in str(advice)


def test_without_a_compiler_the_compiled_variant_is_skipped_in_words(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    advice = advise(nn.Linear(4, 4), torch.ones(1, 4), seconds=0.05)
    assert "dense compiled: not possible, RuntimeError: No working C++ compiler found" in str(advice)
    assert advice.best == "dense"


def test_without_native_kernels_the_rest_is_measured(monkeypatch):
    from lightning_rigl.export import sparse_model as exporter

    monkeypatch.setattr(exporter, "native", lambda: None)
    net = sparse_mlp()
    net[0].weight.data[:, :8] = 0.0  # dead inputs
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the table says it
        advice = advise(net, torch.randn(8, 512), seconds=0.05, compile=False)
    assert advice.variants[-1].timing is not None, "compacted and sparse"
    assert "sparse native: not possible, RuntimeError: the native kernels cannot be had here" in str(advice)
    assert advice.best != "sparse native"
    with pytest.raises(RuntimeError):
        sparse(sparse_mlp(), "native")


def test_other_dtypes_are_measured_densely():
    net = sparse_mlp().double()
    advice = advise(net, torch.randn(8, 512).double(), seconds=0.05, compile=False)
    assert "torch.float64 on cpu, and sparse products are float32 on the CPU" in str(advice)
    assert {v.name for v in advice.variants if v.timing} == {"dense", "compacted"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_sparse_variants_are_not_possible():
    advice = advise(sparse_mlp().cuda(), torch.randn(8, 512, device="cuda"), seconds=0.2, compile=False)
    assert "torch.float32 on cuda:0, and sparse products are float32 on the CPU" in str(advice)
    assert {v.name for v in advice.variants if v.timing} == {"dense", "compacted"}


def test_rich_prints_it_too(forms):
    rich = pytest.importorskip("rich.table")
    assert isinstance(advise(*forms(dense=0.01)).__rich__(), rich.Table)


@pytest.mark.parametrize(
    ("model", "x", "seconds", "error", "words"),
    [
        (3, torch.ones(1), 1.0, TypeError, "torch.nn.Module, got int"),
        (nn.Linear(3, 2), torch.ones(1, 4), 1.0, ValueError, "Linear does not run on the example"),
        (nn.Linear(3, 2), torch.ones(1, 3), 0.0, ValueError, "above 0, got 0.0"),
        (nn.Linear(3, 2), torch.ones(1, 3), float("nan"), ValueError, "got nan"),
    ],
)
def test_bad_arguments_are_refused(model, x, seconds, error, words):
    with pytest.raises(error, match=words):
        advise(model, x, seconds=seconds)
