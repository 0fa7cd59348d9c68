import torch
from torch import nn

from lightning_rigl import Sparsifier
from lightning_rigl.compute.crossover import ASKED, SAFE, Rule, least_rows
from lightning_rigl.compute.linear import SparseProduct


def test_sparser_and_larger_layers_gain_from_fewer_rows_on():
    for rules in (SAFE, ASKED):
        for rule in rules.values():
            rows = [least_rows(1 << 20, count, rule) for count in (10_000, 50_000, 80_000)]
            assert rows == sorted(rows)
            assert least_rows(1 << 22, 40_000, rule) <= rows[0]


def test_a_layer_that_is_too_dense_or_too_small_never_gains():
    assert least_rows(1 << 20, 400_000, SAFE["native"]) is None
    assert least_rows(1000, 10, SAFE["native"]) is None
    assert least_rows(1 << 20, 100_000, SAFE["torch"]) is None


def test_an_input_of_few_rows_is_left_to_the_dense_product():
    mask = torch.rand(8, 6) < 0.3
    weight = nn.Parameter(torch.randn(8, 6) * mask)
    product = SparseProduct(weight, mask, "torch", Rule(1.0, 0, 48 * 12 * (1 - int(mask.sum()) / 48)))
    assert not product.fits(torch.randn(11, 6), weight)
    assert product.fits(torch.randn(12, 6), weight)
    assert product.fits(torch.randn(3, 4, 6), weight)


def test_what_was_asked_for_is_taken_sooner_than_what_is_safe():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    sparsity = {"0.weight": 0.85, "2.weight": 0.5}
    asked = Sparsifier(model, sparsity, seed=0, compute="torch")
    assert asked.compute.cells == {"0.weight": "torch from 39 rows", "2.weight": "dense"}
    assert str(asked.summary()).count("torch from 39 rows") == 1
