"""A few connections, drawn by hand, for each method that keeps averages, moves connections or walks.

The layer A of most of them:

    index      0     1     2     3     4     5     6     7
    weight   0.5  -0.1   0.3  -0.4     0     0     0     0      four active connections
"""

import pytest
import torch

from lightning_rigl.methods.base import Connections, Moment
from lightning_rigl.methods.deepr import DeepR
from lightning_rigl.methods.dsr import DSR
from lightning_rigl.methods.rigl_inverted import RigLInverted
from lightning_rigl.methods.rigl_sg import RigLSG
from lightning_rigl.methods.rigl_sm import RigLSM
from lightning_rigl.methods.snfs import SNFS
from lightning_rigl.methods.snfs_original import SNFSOriginal
from lightning_rigl.topology.patterns import Unstructured

A = torch.tensor([0.5, -0.1, 0.3, -0.4, 0, 0, 0, 0])
B = torch.cat([torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(16)])


def layer(weight, grad=None, seed=0):
    return Connections(weight, weight != 0, grad, torch.Generator().manual_seed(seed))


def seeing(seen, grad):
    """The same layer at a later step, with its notes."""
    return Connections(seen.weight, seen.mask, grad, seen.generator, notes=seen.notes)


def update(method, layers, fraction=0.0, numbers=None):
    """(kept, new) of each layer, as indices."""
    moment = Moment(0, fraction, numbers={} if numbers is None else numbers)
    masks = []
    for seen, (dropped, grown) in zip(layers, method.turnover(layers, moment), strict=True):
        kept = Unstructured().drop(method.drop_score(seen), seen.mask, dropped)
        new = Unstructured().grow(method.grow_score(seen), kept, grown)
        masks.append((kept.nonzero().view(-1).tolist(), new.nonzero().view(-1).tolist()))
    return masks


# --- SNFS: m <- b m + (1 - b) g over all connections ---


def test_snfs_grows_where_the_average_is_largest_and_not_the_last_gradient():
    method = SNFS(momentum=0.5)
    seen = layer(A, torch.tensor([0, 0, 0, 0, 0.8, 0, 0.2, 0]))
    method.observe(seen, Moment(0))
    assert seen.notes["momentum"].tolist() == pytest.approx([0, 0, 0, 0, 0.4, 0, 0.1, 0])
    seen = seeing(seen, torch.tensor([0, 0, 0, 0, 0.1, -0.3, 0.2, 0]))
    method.observe(seen, Moment(1))
    assert seen.notes["momentum"].tolist() == pytest.approx([0, 0, 0, 0, 0.25, -0.15, 0.15, 0])
    assert update(method, [seen], 0.25) == [([0, 2, 3], [0, 2, 3, 4])]  # 1 goes; the last gradient says 5


def test_snfs_without_memory_is_the_last_gradient():
    seen = layer(A, torch.tensor([0, 0, 0, 0, 0.8, 0, 0.2, 0]))
    SNFS(momentum=0.0).observe(seen, Moment(0))
    assert torch.equal(seen.notes["momentum"], seen.grad)


# --- SNFS as published: two layers, 3 : 1 by mean |m| of their active connections ---

MOMENTUM_A = torch.tensor([3.0, -3, 3, -3, 0, 1, 2, 0])
MOMENTUM_B = torch.cat([torch.ones(4), torch.full((16,), 0.01).index_fill(0, torch.tensor([7]), 9.0)])


def test_snfs_original_moves_connections_to_the_layer_of_larger_momentum():
    """Both drop 2 of 4. Of the 4 to grow, A gets 3: 5, 6 and the just dropped 1; B one, its largest."""
    a, b = layer(A), layer(B)
    a.notes["momentum"], b.notes["momentum"] = MOMENTUM_A, MOMENTUM_B
    assert update(SNFSOriginal(), [a, b], 0.5) == [([0, 3], [0, 1, 2, 3, 6]), ([0, 1], [0, 1, 11])]


def test_snfs_original_rounds_the_dropped_up_and_keeps_the_last_connection():
    a, b = layer(A), layer(torch.tensor([0.1, 0.0, 0.0]))
    a.notes["momentum"], b.notes["momentum"] = torch.ones(8), torch.ones(3)
    assert SNFSOriginal().turnover([a, b], Moment(0, 0.3)) == [(2, 1), (0, 1)]
    assert SNFSOriginal().turnover([a, b], Moment(0, 1.0)) == [(3, 2), (0, 1)]
    assert SNFSOriginal().turnover([a, b], Moment(0, 0.0)) == [(0, 0), (0, 0)]


# --- RigL-SG and RigL-SM: shares by active connections, growth by the dense gradient ---

GRADIENT_A = torch.tensor([3.0, -3, 3, -3, 0.1, 0.9, 0.8, 0])
GRADIENT_B = torch.cat([torch.ones(4), torch.full((16,), 50.0)])  # huge where nothing is active


def test_rigl_sg_shares_by_the_gradient_of_active_connections_only():
    a, b = layer(A, GRADIENT_A), layer(B, GRADIENT_B)
    assert update(RigLSG(), [a, b], 0.5) == [([0, 3], [0, 1, 2, 3, 5]), ([0, 1], [0, 1, 4])]


def test_rigl_sm_shares_by_momentum_and_grows_by_gradient():
    method = RigLSM(momentum=0.5)
    a, b = layer(A, GRADIENT_A), layer(B, GRADIENT_B)
    method.observe(a, Moment(0))
    method.observe(b, Moment(0))
    assert a.notes["momentum"].tolist() == [1.5, -1.5, 1.5, -1.5, 0, 0, 0, 0]
    assert b.notes["momentum"].tolist() == [0.5] * 4 + [0.0] * 16  # nothing of the inactive is known
    a, b = seeing(a, -GRADIENT_A / 6), seeing(b, GRADIENT_B)  # by gradient the shares would be 1 : 2
    assert update(method, [a, b], 0.5) == [([0, 3], [0, 1, 2, 3, 5]), ([0, 1], [0, 1, 4])]


def test_rigl_sm_begins_anew_with_a_connection():
    method, notes = RigLSM(momentum=0.5), {"momentum": torch.tensor([4.0, 4, 0, 0])}
    mask = torch.tensor([True, False, True, False])  # 1 was dropped, 2 is new
    method.observe(Connections(mask.float(), mask, torch.ones(4), torch.Generator(), notes=notes), Moment(1))
    assert notes["momentum"].tolist() == [2.5, 0, 0.5, 0]


# --- RigL inverted ---


def test_rigl_inverted_grows_the_smallest_gradient():
    gradient = torch.tensor([0.1, -0.9, 0.2, 0.3, 0.8, -0.5, 0.4, 0.6])
    assert update(RigLInverted(), [layer(A, gradient)], 0.25) == [([0, 2, 3], [0, 2, 3, 6])]
    assert update(RigLInverted(), [layer(A, gradient)], 0.5) == [([0, 3], [0, 2, 3, 6])]  # 2 returns


# --- DSR ---


def test_dsr_drops_below_one_threshold_and_grows_by_what_is_left():
    """H = 0.2. A loses 0.1 and -0.05 of 4; B would lose all 3, but its largest stays.

    Left are 2 and 1: of the 4 to grow A gets 2.67 -> 3 and B 1.33 -> 1. A has two free places only, so B gets
    the third. What A dropped does not come back.
    """
    a = layer(torch.tensor([0.5, 0.1, 0, -0.05, 0.3, 0]))
    b = layer(torch.tensor([0.01, 0.03, 0.02, 0, 0, 0, 0, 0, 0, 0]))
    numbers = {"threshold": 0.2}
    (kept_a, new_a), (kept_b, new_b) = update(DSR(), [a, b], 0.14, numbers)
    assert (kept_a, new_a) == ([0, 4], [0, 2, 4, 5])
    assert kept_b == [1]
    assert len(new_b) == 3
    assert not {0, 2} & set(new_b)
    assert numbers == {"threshold": 0.1}  # 4 are more than 1.1 x 0.14 x 7


@pytest.mark.parametrize(("fraction", "after"), [(0.18, 0.1), (0.19, 0.2), (0.22, 0.2), (0.23, 0.4)], ids=str)
def test_dsr_halves_and_doubles_by_the_ten_percent_rule(fraction, after):
    """Of ten connections two are below 0.2: within 10 % of 1.9 and 2.2, not of 1.8 (1.98) or 2.3 (2.07)."""
    seen = layer(torch.cat([torch.full((2,), 0.1), torch.full((8,), 0.9), torch.zeros(10)]))
    numbers = {"threshold": 0.2}
    assert DSR().turnover([seen], Moment(0, fraction, numbers=numbers)) == [(2, 2)]
    assert numbers["threshold"] == after


def test_dsr_drops_strictly_below_and_begins_with_its_own_threshold():
    numbers = {}
    seen = layer(torch.tensor([0.25, 0.125, 0.5, 0.0]))
    assert DSR(threshold=0.25).turnover([seen], Moment(0, 1 / 3, numbers=numbers)) == [(1, 1)]
    assert numbers == {"threshold": 0.25}


def test_dsr_takes_a_dropped_connection_back_only_where_no_place_is_left():
    a, b = layer(torch.tensor([0.5, 0.1, 0.1])), layer(torch.tensor([0.5, 0.1, 0.1, 0.0]))
    numbers = {"threshold": 0.2}
    (_, new_a), (kept_b, new_b) = update(DSR(), [a, b], 1.0, numbers)
    assert 3 in new_b  # the one free place
    assert len(new_a) + len(new_b) == 6
    assert kept_b == [0]


# --- DEEP R ---

RATE = 0.1


def walk(method, seen):
    """One step without a gradient; returns the layer after it."""
    method.observe(seen, Moment(0, rate=RATE))
    weight = method.settle(seen, Moment(0, rate=RATE))
    return Connections(weight, seen.mask, None, seen.generator, notes=seen.notes)


def test_deepr_shrinks_and_drops_what_changes_its_sign():
    """l1 = 2 at rate 0.1 takes 0.2 of each strength: that of 1 was 0.1."""
    seen = walk(DeepR(l1=2.0, temperature=0.0), layer(A))
    assert seen.weight.tolist() == pytest.approx([0.3, 0, 0.1, -0.2, 0, 0, 0, 0])
    assert seen.notes["sign"].tolist() == [1, 0, 1, -1, 0, 0, 0, 0]
    ((kept, new),) = update(DeepR(), [seen])
    assert kept == [0, 2, 3]
    assert len(new) == 4


def test_deepr_notices_a_step_across_zero():
    method, seen = DeepR(l1=0.0, temperature=0.0), layer(A)
    method.observe(seen, Moment(0))
    stepped = Connections(A * torch.tensor([1, -1, 1, 1, 1, 1, 1, 1]), seen.mask, None, seen.generator)
    stepped.notes.update(seen.notes)
    assert method.settle(stepped, Moment(0, rate=RATE)).tolist() == pytest.approx(
        [0.5, 0, 0.3, -0.4, 0, 0, 0, 0]
    )
    assert method.turnover([stepped], Moment(0)) == [(1, 1)]


def test_deepr_a_strength_of_zero_is_active_until_its_first_move():
    """Without l1 and noise nothing moves it; with l1 its first move is downwards."""
    mask = torch.tensor([True, True, False])
    still = Connections(torch.tensor([0.5, 0.0, 0.0]), mask, None, torch.Generator().manual_seed(0))
    assert DeepR().turnover([walk(DeepR(0.0, 0.0), still)], Moment(0)) == [(0, 0)]
    assert still.notes["sign"][0] == 1
    assert still.notes["sign"][1] in (-1, 1)
    assert DeepR().turnover([walk(DeepR(0.1, 0.0), still)], Moment(0)) == [(1, 1)]


def test_deepr_signs_of_new_connections_are_random_and_independent_of_the_noise():
    mask = torch.ones(20_000, dtype=torch.bool)
    seen = walk(
        DeepR(0.0, 1.0), Connections(torch.zeros(20_000), mask, None, torch.Generator().manual_seed(5))
    )
    stays = (seen.notes["sign"] != 0).float()
    assert stays.mean().item() == pytest.approx(0.5, abs=0.02)  # half of the first moves are along the sign
    assert (seen.weight[seen.weight != 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert seen.weight.square().sum().item() / stays.sum().item() == pytest.approx(2 * RATE, rel=0.05)


def test_deepr_in_a_full_layer_begins_again_in_place():
    full = Connections(
        torch.tensor([0.5, 0.01]), torch.ones(2).bool(), None, torch.Generator().manual_seed(0)
    )
    seen = walk(DeepR(l1=1.0, temperature=0.0), full)
    assert seen.weight.tolist() == pytest.approx([0.4, 0.0])
    assert DeepR().turnover([seen], Moment(0)) == [(0, 0)]
    DeepR().observe(seen, Moment(1))
    assert seen.notes["sign"].abs().tolist() == [1, 1]


# --- Refusals ---


@pytest.mark.parametrize("method", [SNFS, SNFSOriginal, RigLSM])
@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_out_of_range_is_refused(method, momentum):
    with pytest.raises(ValueError, match=rf"{method.__name__.lower()}, momentum: .* in \[0, 1\)"):
        method(momentum=momentum)


@pytest.mark.parametrize("make", [SNFS, SNFSOriginal, RigLSM, DSR, DeepR])
@pytest.mark.parametrize("value", ["0.5", None, True])
def test_what_is_no_number_is_refused(make, value):
    with pytest.raises(TypeError, match="a number, got"):
        make(value)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("inf"), float("nan")])
def test_dsr_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="above 0"):
        DSR(threshold=threshold)


@pytest.mark.parametrize("arguments", [{"l1": -1.0}, {"temperature": -1e-9}, {"l1": float("nan")}])
def test_deepr_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"deepr, {next(iter(arguments))}: a number of at least 0"):
        DeepR(**arguments)
