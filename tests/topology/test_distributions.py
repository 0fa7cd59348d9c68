"""Shapes and a sparsity -> integer counts by the official rule."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_rigl import ER, ERK, PerLayer, Uniform
from lightning_rigl.topology.distributions import Distribution
from tests import reference

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "topology_golden.json").read_text())
LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def pytorch_shape(shape):
    """HWIO / (in, out) of the golden file as PyTorch stores it."""
    return (shape[-1], shape[-2], *shape[:-2])


def golden_cases():
    for key, case in GOLDEN.items():
        if not key.startswith("_"):
            network, sparsity = key.split("|")
            yield pytest.param(network, float(sparsity), case["layers"], id=key)


@pytest.mark.parametrize(("network", "sparsity", "layers"), list(golden_cases()))
def test_published_networks(network, sparsity, layers):
    names = [f"{layer['name']}_{i}" for i, layer in enumerate(layers)]
    shapes = {name: pytorch_shape(layer["shape"]) for name, layer in zip(names, layers, strict=True)}
    zeros = {name: layer["n_zeros"] for name, layer in zip(names, layers, strict=True)}
    if "conv1dense" in network:
        distribution = ERK(fixed={"^conv1_": 0.0})
    elif "dwdense" in network:
        distribution = ERK(fixed={"^dw": 0.0})
    else:
        distribution = ER() if network.endswith("_er") else ERK()
    counts = distribution.counts(shapes, sparsity)
    off = {name: math.prod(shapes[name]) - counts[name] - zeros[name] for name in shapes}
    # one golden entry was computed in another order of operations than the official code's
    assert sum(map(abs, off.values())) <= (1 if network == "lenet300100_erk" else 0), off


def test_lenet_at_ninety_percent():
    assert ERK().counts(LENET, 0.9) == {"fc1": 18_715, "fc2": 6_906, "fc3": 1_000}
    assert ER().counts(LENET, 0.9) == ERK().counts(LENET, 0.9)  # no kernel, no difference
    assert ERK(power=0).counts(LENET, 0.9) == Uniform(dense_first=False).counts(LENET, 0.9)
    assert Uniform().counts(LENET, 0.9) == {"fc2": 3_000, "fc3": 100}


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_uniform_counts_are_exact(size, sparsity):
    count = Uniform(dense_first=False).counts({"a": (size, 1)}, sparsity)["a"]
    assert count == size - math.floor(sparsity * size)
    assert 1 <= count <= size


def test_a_large_layer_is_counted_without_rounding():
    size = 2**24 + 3
    assert Uniform(dense_first=False).counts({"a": (size, 1)}, 0.5) == {"a": size - size // 2}


@st.composite
def networks(draw):
    dims = st.integers(1, 40)
    kernels = st.sampled_from([(), (1,), (3, 3), (5, 1)])
    return {f"l{i}": (draw(dims), draw(dims), *draw(kernels)) for i in range(draw(st.integers(1, 8)))}


@given(networks(), st.floats(0, 0.995), st.sampled_from(["er", "erk", "erk2"]))
def test_er_and_erk_meet_the_budget_and_saturate(shapes, sparsity, kind):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assume((1 - sparsity) * sum(sizes.values()) >= len(shapes))
    distribution = {"er": ER(), "erk": ERK(), "erk2": ERK(power=0.5)}[kind]
    counts = distribution.counts(shapes, sparsity)
    assert all(1 <= counts[name] <= sizes[name] for name in shapes)
    excess = sum(counts.values()) - (1 - sparsity) * sum(sizes.values())
    assert -1e-6 <= excess < 2 * len(shapes)
    twin = reference.er_counts if kind == "er" else reference.erk_counts
    power = {} if kind == "er" else {"power": distribution.power}
    assert counts == twin(shapes, sparsity, **power)


@given(networks(), st.floats(0.1, 0.9))
def test_a_denser_budget_never_takes_from_a_layer(shapes, sparsity):
    total = sum(math.prod(shape) for shape in shapes.values())
    assume((1 - sparsity) * total >= len(shapes))
    sparse, dense = ERK().counts(shapes, sparsity), ERK().counts(shapes, sparsity - 0.1)
    assert all(dense[name] >= sparse[name] - 1 for name in shapes)


def test_fixed_layers_take_no_part_in_the_balance():
    free = {name: shape for name, shape in LENET.items() if name != "fc1"}
    assert ERK(fixed={"1": 0.5}).counts(LENET, 0.9) == {"fc1": 117_600, **ERK().counts(free, 0.9)}


def test_per_layer_first_match_wins_and_the_rest_is_dense():
    assert PerLayer({"fc[12]": 0.5, "fc1": 0.9}).counts(LENET, 0.0) == {"fc1": 117_600, "fc2": 15_000}
    assert PerLayer({"fc3": 0}).counts(LENET, 0.0) == {"fc3": 1_000}


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), "0.9", True, None])
@pytest.mark.parametrize("distribution", [Uniform(), ER(), ERK()])
def test_a_sparsity_outside_its_range_is_refused(distribution, sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        distribution.counts(LENET, sparsity)


def test_an_impossible_budget_names_the_feasible_maximum():
    with pytest.raises(ValueError, match=r"at most 0\.75"):
        ERK().counts({"a": (4, 1), "b": (4, 1)}, 0.9)
    with pytest.raises(ValueError, match="dense_first"):
        Uniform().counts({"a": (4, 4)}, 0.5)


def test_a_pattern_that_matches_nothing_names_near_misses():
    with pytest.raises(ValueError, match=r"'fcc1' matches no layer; near misses: fc1"):
        PerLayer({"fcc1": 0.5}).counts(LENET, 0.0)
    with pytest.raises(ValueError, match="not a regular expression"):
        ERK(fixed={"(": 0.5}).counts(LENET, 0.9)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        ERK(fixed={"fc1": 1.0})


@pytest.mark.parametrize(
    "make",
    [lambda: ERK(power="a"), lambda: ERK(fixed="a"), lambda: PerLayer({1: 0.5}), lambda: PerLayer([0.5])],
)
def test_other_types_are_refused(make):
    with pytest.raises(TypeError, match=r"sparsity|power"):
        make()


def test_numpy_numbers_are_numbers():
    assert ERK().counts(LENET, np.float64(0.9)) == ERK().counts(LENET, 0.9)


def test_short_names():
    assert Distribution.of("ERK") == ERK()
    assert Distribution.of("uniform") == Uniform()
    assert Distribution.of(ER()) == ER()
    with pytest.raises(
        ValueError, match=r"unknown name 'erd'; the known ones are ends, er, erk, .*uniform; did you mean 'er"
    ):
        Distribution.of("erd")
    with pytest.raises(TypeError, match="expected a Distribution"):
        Distribution.of(3)
