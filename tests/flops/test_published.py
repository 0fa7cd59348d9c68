"""ResNet-50 at the sparsities of the paper: its FLOPs beside the published ratios (figure 2)."""

import pytest
import torch

from benchmarks.resnet50 import resnet50
from lightning_rigl import ERK, Uniform
from lightning_rigl.flops.formulas import forward_cost
from lightning_rigl.flops.tracer import Tracer
from lightning_rigl.model.layers import select


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        model = resnet50()
        with Tracer(dict(model.named_parameters())) as tracer:
            model(torch.zeros(2, 3, 224, 224))
    shapes = {name: tuple(parameter.shape) for name, parameter in select(model).items()}
    return tracer.table(samples=2), shapes


def test_the_dense_network(network):
    table, shapes = network
    assert forward_cost(table) == 8_178_368_512
    assert len(shapes) == 54
    assert table.unknown == ()


@pytest.mark.parametrize(
    ("distribution", "sparsity", "published"),
    [
        (ERK(), 0.8, 0.42),
        (ERK(), 0.9, 0.24),
        (Uniform(), 0.8, 0.23),
        (Uniform(), 0.9, 0.13),
        (ERK(), 0.95, 0.12),
        (Uniform(), 0.95, 0.08),
    ],
)
def test_published_ratios(network, distribution, sparsity, published):
    table, shapes = network
    counts = distribution.counts(shapes, sparsity)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert abs(sum(counts.values()) / sum(sizes[name] for name in counts) - (1 - sparsity)) < 1e-5
    ratio = forward_cost(table, counts, "official") / forward_cost(table, convention="official")
    assert ratio == pytest.approx(published, abs=0.01)
