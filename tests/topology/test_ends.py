"""A sparsity of its own for the first and the last layer."""

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from examples.paper_networks import ResNet50
from lightning_rigl import ER, ERK, PerLayer, RigLCallback, Sparsifier, Uniform, cli
from lightning_rigl.model.layers import select
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.ends import Ends
from lightning_rigl.topology.smart_ratio import SmartRatio
from lightning_rigl.topology.str_resnet50 import STR
from tests import reference

ROOT = Path(__file__).parent.parent.parent
LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
FLAT = Uniform(dense_first=False)


def test_three_layers_by_hand():
    """784-300-100 with 99 % / 89 % and a dense output: the start of the paper's MNIST compression."""
    assert Ends(FLAT, first=0.99, last=0.0).counts(LENET, 0.89) == {
        "fc1": 235_200 - 232_848,
        "fc2": 30_000 - 26_700,
        "fc3": 1_000,
    }


def test_the_rest_has_the_sparsity_that_is_asked_for():
    """The connections of a dense first layer are not taken from the others."""
    for rule in ("erk", "er", FLAT, ERK(power=0.5)):
        rest = {name: shape for name, shape in LENET.items() if name != "fc1"}
        alone = Distribution.of(rule).counts(rest, 0.9)
        assert Ends(rule, first=0.0).counts(LENET, 0.9) == {"fc1": 235_200, **alone}


def test_the_papers_99_percent_network_has_a_dense_first_layer():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in select(ResNet50()).items()}
    counts = Ends("erk", first=0.0).counts(shapes, 0.99)
    assert counts == ERK(fixed={"^conv1": 0.0}).counts(shapes, 0.99)
    assert counts["conv1.weight"] == 9_408
    eps = 4.880494  # published test vector of the official algorithm
    for name, shape in shapes.items():
        if name != "conv1.weight":
            assert counts[name] == pytest.approx(eps * sum(shape), abs=1 + 1e-3 * sum(shape) / 1000)


@st.composite
def networks(draw):
    dims = st.integers(1, 40)
    kernels = st.sampled_from([(), (1,), (3, 3), (5, 1)])
    return {f"l{i}": (draw(dims), draw(dims), *draw(kernels)) for i in range(draw(st.integers(1, 7)))}


OWN = st.none() | st.sampled_from([0.0, 0.5, 0.25])


@given(networks(), st.floats(0, 0.95), OWN, OWN, st.sampled_from([1.0, 0.5]))
def test_what_erk_can_say_it_says_the_same(shapes, sparsity, first, last, power):
    names = list(shapes)
    ends = {names[0]: first, names[-1]: last} if len(names) > 1 else {names[0]: first}
    last = last if len(names) > 1 else None
    fixed = {name: own for name, own in ends.items() if own is not None}
    rules = {f"^{name}$": own for name, own in fixed.items()}
    free = sum(math.prod(shape) for name, shape in shapes.items() if name not in fixed)
    assume((1 - sparsity) * free >= len(shapes) - len(fixed) + 1e-6)
    counts = Ends(ERK(power), first, last).counts(shapes, sparsity)
    assert counts == ERK(power, rules).counts(shapes, sparsity)
    assert counts == reference.erk_counts(shapes, sparsity, power, fixed)
    assert list(counts) == names


def test_without_ends_it_is_the_distribution_itself():
    for rule in (ERK(), ER(), FLAT, Uniform(), PerLayer({"fc[12]": 0.5}), SmartRatio()):
        assert Ends(rule).counts(LENET, 0.9) == rule.counts(LENET, 0.9)
    assert Ends().counts({}, 0.9) == {}


def test_each_end_may_be_left_to_the_distribution():
    assert Ends(Uniform(), last=0.0).counts(LENET, 0.9) == {"fc2": 3_000, "fc3": 1_000}
    assert Ends(FLAT, last=0.5).counts(LENET, 0.9) == {"fc1": 23_520, "fc2": 3_000, "fc3": 500}
    assert Ends(PerLayer({"fc2": 0.5}), last=0.5).counts(LENET, 0.0) == {"fc2": 15_000, "fc3": 500}
    nested = Ends(Ends(FLAT, last=0.5), first=0.0)
    assert nested.counts(LENET, 0.9) == Ends(FLAT, first=0.0, last=0.5).counts(LENET, 0.9)


def test_smart_ratio_counts_its_layers_from_the_output():
    """So that taking the first one away changes the proportions of the others by nothing."""
    counts = Ends(SmartRatio(), first=0.0).counts({"a": (10, 10), **dict.fromkeys("bcd", (100, 100))}, 0.8)
    assert counts["a"] == 100
    assert counts["b"] / counts["c"] == pytest.approx(12 / 6, abs=0.01)
    assert counts["d"] == 3_000


@pytest.mark.parametrize(
    ("of", "end"),
    [
        (Uniform(), "first"),
        ("uniform", "first"),
        (SmartRatio(), "last"),
        (Ends(first=0.5), "first"),
        (Ends(last=0.5), "last"),
        (Ends(Uniform(), last=0.5), "first"),
    ],
    ids=str,
)
def test_two_rules_for_one_layer_are_refused(of, end):
    """Else the distribution would apply its own to the next layer."""
    with pytest.raises(
        ValueError, match=rf"distribution ends: {end}=0.0 and rest=.* both decide the {end} layer"
    ):
        Ends(of, **{end: 0.0})


def test_a_distribution_that_needs_all_layers_refuses_the_rest():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in select(ResNet50()).items()}
    with pytest.raises(ValueError, match=r"distribution str: .* missing: conv1.weight;"):
        Ends(STR(), first=0.0).counts(shapes, 0.9023)
    with pytest.raises(ValueError, match="'fc1' matches no layer"):
        Ends(ERK(fixed={"fc1": 0.5}), first=0.0).counts(LENET, 0.9)


def test_one_layer():
    one = {"fc": (10, 10)}
    assert Ends(first=0.25).counts(one, 0.9) == {"fc": 75}
    assert Ends(last=0.25).counts(one, 0.9) == {"fc": 75}
    with pytest.raises(ValueError, match=r"fc is the only layer, so both first=0\.0 and last=0\.5"):
        Ends(first=0.0, last=0.5).counts(one, 0.9)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, float("nan"), "0.9", True])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    for end in ("first", "last"):
        with pytest.raises(ValueError, match=rf"distribution ends, {end}: .*\[0, 1\)"):
            Ends(**{end: sparsity})
    for shapes in (LENET, {}, {"fc": (10, 10)}):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            Ends(first=0.0).counts(shapes, sparsity)


def test_other_refusals():
    with pytest.raises(ValueError, match="unknown name 'erg'"):
        Ends("erg")
    with pytest.raises(TypeError, match="expected a Distribution"):
        Ends(3)
    with pytest.raises(ValueError, match="sparsity can be at most"):
        Ends(first=0.0).counts({"a": (9, 9), "b": (4, 1), "c": (4, 1)}, 0.9)


def test_the_part_is_a_value():
    """A name and what it stands for are the same choice, so that a run can be resumed with either."""
    assert Ends("erk", first=0.0) == Ends(ERK(), first=0.0) == Ends("ERK", first=0)
    assert hash(Ends(first=0.5)) == hash(Ends("erk", first=0.5))
    assert repr(Ends(last=0.5)) == "Ends(rest=ERK(power=1.0, fixed=None), first=None, last=0.5)"
    assert pickle.loads(pickle.dumps(Ends(first=0.5))) == copy.deepcopy(Ends(first=0.5)) == Ends(first=0.5)
    assert Distribution.of("ends") == Ends()
    assert Distribution.of(Ends(first=0.5)) == Ends(first=0.5)


def test_a_model_trains_with_it():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    sparsifier = Sparsifier(model, 0.75, distribution=Ends("erk", first=0.0, last=0.5), seed=0)
    assert sparsifier.counts == {"0.weight": 128, "1.weight": 64, "2.weight": 32}
    assert sparsifier.masks["0.weight"].all()


# --- YAML and the command line ---

SMALL = [
    "fit",
    "--model=examples.cli_model.DigitsMLP",
    "--data=examples.cli_model.DigitsData",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
    "--trainer.callbacks+=RigLCallback",
]
CLASS = "lightning_rigl.topology.ends.Ends"


@pytest.fixture
def made(monkeypatch):
    """The RigLCallbacks that the command line has made and used, in order."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lightning-rigl"])
    callbacks = []
    original = RigLCallback.setup

    def setup(self, *args, **kwargs):
        callbacks.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(RigLCallback, "setup", setup)
    return callbacks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([f"={CLASS}", ".first=0.0"], Ends(first=0.0)),
        ([f"={CLASS}", ".rest=er", ".first=0", ".last=0.5"], Ends("er", 0.0, 0.5)),
        ([f"={CLASS}", ".rest=ERK", ".rest.power=0.5", ".last=0.5"], Ends(ERK(0.5), last=0.5)),
        ([f"={CLASS}", ".rest=Uniform", ".rest.dense_first=false"], Ends(FLAT)),
        (["=ends"], Ends()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_constructor(options, expected, made):
    cli.main([*SMALL, *(f"--trainer.callbacks.distribution{option}" for option in options)])
    assert made[0].settings["distribution"] == expected
    assert made[0].masks


def test_a_configuration_says_it(made):
    distribution = {
        "class_path": CLASS,
        "init_args": {
            "rest": {"class_path": "lightning_rigl.ERK", "init_args": {"power": 0.5}},
            "first": 0.0,
            "last": None,
        },
    }
    Path("part.yaml").write_text(yaml.safe_dump(distribution))
    cli.main([*SMALL, "--trainer.callbacks.distribution=part.yaml"])
    assert made[0].settings["distribution"] == Ends(ERK(0.5), first=0.0)
    assert made[0].masks["net.0.weight"].all()


def test_the_help_comes_from_the_docstring(made, capsys):
    with pytest.raises(SystemExit):
        cli.main([*SMALL, f"--trainer.callbacks.distribution.help={CLASS}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "sparsity of the first layer, in [0, 1)" in said
