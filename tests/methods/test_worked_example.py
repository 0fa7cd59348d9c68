"""Eight connections, drawn by hand, at five drop fractions.

    index      0     1     2     3     4     5     6     7
    weight   0.5  -0.1   0.3  -0.4     0     0     0     0      four active connections
    gradient 0.1  -0.9   0.2   0.3   0.8  -0.5   0.4   0.6      of all eight

By |w| the active ones rank 0, 3, 2, 1 and are dropped from the end; by |gradient| all rank
1, 4, 7, 5, 6, 3, 2, 0 and what is not kept grows from the front. Connection 1 is dropped first and has the
largest gradient: it returns.
"""

import pytest
import torch

from lightning_rigl import SET, Connections, RigL, Static
from lightning_rigl.topology.patterns import Unstructured
from tests import reference

WEIGHT = torch.tensor([0.5, -0.1, 0.3, -0.4, 0, 0, 0, 0])
GRADIENT = torch.tensor([0.1, -0.9, 0.2, 0.3, 0.8, -0.5, 0.4, 0.6])
MASK = WEIGHT != 0


def update(method, fraction, weight=WEIGHT, mask=MASK, gradient=GRADIENT):
    layer = Connections(weight, mask, gradient, torch.Generator().manual_seed(0))
    count = int(fraction * int(mask.sum()))
    kept = Unstructured().drop(method.drop_score(layer), mask, count)
    return kept, Unstructured().grow(method.grow_score(layer), kept, count)


@pytest.mark.parametrize(
    ("fraction", "kept", "new"),
    [
        (0.0, [0, 1, 2, 3], [0, 1, 2, 3]),
        (0.25, [0, 2, 3], [0, 1, 2, 3]),  # 1 is dropped and grown again
        (0.5, [0, 3], [0, 1, 3, 4]),
        (0.75, [0], [0, 1, 4, 7]),
        (1.0, [], [1, 4, 5, 7]),
    ],
)
def test_rigl(fraction, kept, new):
    kept_mask, new_mask = update(RigL(), fraction)
    assert kept_mask.nonzero().view(-1).tolist() == kept
    assert new_mask.nonzero().view(-1).tolist() == new
    twin = reference.update_mask(WEIGHT.numpy(), MASK.numpy(), GRADIENT.abs().numpy(), int(fraction * 4))
    assert new_mask.tolist() == twin.tolist()


def test_set_grows_at_random_and_by_its_generator_alone():
    state = torch.random.get_rng_state()
    first, second = update(SET(), 0.5)[1], update(SET(), 0.5, gradient=None)[1]
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    grown = torch.zeros(8)
    for seed in range(2000):
        layer = Connections(WEIGHT, MASK, None, torch.Generator().manual_seed(seed))
        kept = Unstructured().drop(SET().drop_score(layer), MASK, 2)
        grown += Unstructured().grow(SET().grow_score(layer), kept, 2) & ~kept
    assert grown[[0, 3]].tolist() == [0, 0]  # kept
    assert ((grown[[1, 2, 4, 5, 6, 7]] / 2000 - 1 / 3).abs() < 0.05).all()  # all others alike


def test_static_changes_nothing_even_if_it_were_updated():
    assert torch.equal(update(Static(), 0.75)[1], MASK)
    assert Static().schedule is None


def test_ties_at_zero_do_not_resurrect_inactive_connections():
    zero = torch.zeros(8)
    kept, new = update(RigL(), 0.5, weight=zero, gradient=zero)
    assert kept.tolist() == [True, True, False, False, False, False, False, False]
    assert new.tolist() == MASK.tolist()


def test_a_method_that_reads_the_gradient_without_declaring_it_is_told():
    layer = Connections(WEIGHT, MASK, None, torch.Generator())
    with pytest.raises(RuntimeError, match="at_updates"):
        RigL().grow_score(layer)
