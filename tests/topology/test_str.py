"""The sparsities that STR found for the layers of ResNet-50."""

import math
from fractions import Fraction

import pytest
import torch

from examples.paper_networks import ResNet50
from lightning_rigl.model.layers import select
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.str_resnet50 import _ROWS, STR, resnet50

# per cent, in the order of the table, as the paper prints them
PRINTED = [
    *("79.55", "81.27", "87.70", "90.23", "90.55", "94.80", "95.03", "95.15"),
    *("96.11", "96.53", "97.78", "98.05", "98.22", "98.79", "98.98", "99.10"),
]
COLUMNS = [  # sums of the 54 printed values, in hundredths
    *(435_662, 443_638, 484_455, 492_455, 492_692, 514_662, 517_884, 517_294),
    *(521_913, 523_649, 529_121, 530_131, 530_879, 533_119, 534_039, 534_490),
]
OFF = {"95.03": "95.02"}  # what the layers of the paper's own table add up to


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in select(ResNet50()).items()}


def refusal(shapes, sparsity=0.9023):
    with pytest.raises(ValueError, match="distribution str") as refused:
        STR().counts(shapes, sparsity)
    return str(refused.value)


def test_a_layer_of_the_table():
    """The paper's 90.23 % network: conv1 has 59.80 %, layer4.2.conv3 80.29 %, fc 64.50 %."""
    counts = STR().counts({f"{name}.weight": shape for name, shape in resnet50().items()}, 0.9023)
    assert counts["conv1.weight"] == 9_408 - 5_625  # 0.5980 x 9,408 = 5,625.98
    assert counts["layer4.2.conv3.weight"] == 1_048_576 - 841_901  # 841,901.67
    assert counts["fc.weight"] == 2_048_000 - 1_320_960


def test_the_layers_are_those_of_a_resnet_50_in_module_order(network):
    assert network == {f"{name}.weight": shape for name, shape in resnet50().items()}
    assert list(STR().counts(network, 0.9023)) == list(network)
    assert list(_ROWS) == list(resnet50())
    assert sum(math.prod(shape) for shape in network.values()) == 25_502_912


@pytest.mark.parametrize("printed", PRINTED)
def test_the_layers_add_up_to_the_printed_sparsity(network, printed):
    counts = STR().counts(network, float(printed) / 100)
    zeros = 100 * (1 - sum(counts.values()) / 25_502_912)
    assert f"{zeros:.2f}" == OFF.get(printed, printed)
    assert abs(zeros - float(printed)) < 0.01


@pytest.mark.parametrize("column", range(16))
def test_every_count_follows_the_rule_exactly(network, column):
    """In exact arithmetic; in double precision 0.5065 x 2,048,000 is just below 1,037,312."""
    counts = STR().counts(network, float(PRINTED[column]) / 100)
    for name, shape in network.items():
        hundredths, size = _ROWS[name.removesuffix(".weight")][column], math.prod(shape)
        assert 0 <= hundredths < 10_000
        zeros = math.floor(Fraction(hundredths, 10_000) * size)
        below = (name, hundredths) == ("fc.weight", 5065)
        assert size - counts[name] == zeros - below


def test_no_digit_has_changed():
    """A slip in a small layer would hide in the overall sparsity."""
    columns = [sum(values[column] for values in _ROWS.values()) for column in range(16)]
    assert columns == COLUMNS


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "layer1."])
def test_a_prefix_is_no_part_of_a_layer(network, prefix):
    counts = STR().counts({prefix + name: shape for name, shape in network.items()}, 0.8127)
    assert counts == {prefix + name: count for name, count in STR().counts(network, 0.8127).items()}


def test_another_sparsity_is_refused_with_the_nearest(network):
    message = refusal(network, 0.9)
    assert "no network of sparsity 0.9, the nearest has 0.9023" in message
    assert all(f"{float(printed) / 100:.4f}".rstrip("0") in message for printed in PRINTED)
    assert "nearest has 0.7955" in refusal(network, 0.0)
    assert "nearest has 0.991" in refusal(network, 0.999)
    assert "nearest has 0.9023" in refusal(network, 0.90232)
    for sparsity in (1.0, -0.1, 90.23, "0.9023", None):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            STR().counts(network, sparsity)


def test_the_sparsity_may_come_from_arithmetic(network):
    assert STR().counts(network, 1 - 0.0977) == STR().counts(network, 0.9023)


def test_another_network_is_refused_in_words(network):
    without = {name: shape for name, shape in network.items() if name != "layer3.4.conv2.weight"}
    assert "missing: layer3.4.conv2.weight;" in refusal(without)
    more = {**network, "head.weight": (10, 1000)}
    assert "unexpected: head.weight;" in refusal(more)
    assert "of another shape: fc.weight with (10, 2048) instead of (1000, 2048);" in refusal(
        {**network, "fc.weight": (10, 2048)}
    )
    twice = {f"{side}.{name}": shape for side in "ab" for name, shape in network.items()}
    assert (
        "unexpected: b.conv1.weight, b.layer1.0.conv1.weight, b.layer1.0.conv2.weight and 51 more"
        in refusal(twice)
    )
    assert "missing: conv1.weight, layer1.0.conv1.weight" in refusal({"fc1.weight": (300, 784)})
    assert "missing: conv1.weight" in refusal({})
    no_first = {f"net.{name}": shape for name, shape in network.items() if name != "layer1.0.conv1.weight"}
    assert "missing: net.layer1.0.conv1.weight;" in refusal(no_first)


def test_a_wider_network_has_other_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in select(ResNet50(width=0.5)).items()}
    assert "of another shape: conv1.weight with (32, 3, 7, 7)" in refusal(shapes)


def test_the_short_name():
    assert Distribution.of("str") == STR()
