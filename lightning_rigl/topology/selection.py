"""Scores and integer counts -> masks. Exact counts; of equal scores the lower flat index wins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rigl.kernels import library, topology_calls

_DIGIT = 11  # bits that one histogram looks at
_SAMPLE = 1 << 12


def top(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """The ``count`` highest scores among the candidates.

    Exact, without sorting a layer: a sample of the scores gives a bound that most candidates fail; a radix
    selection finds the threshold among the rest, by a histogram of the upper bits of an order-preserving
    integer, then of the next bits inside one bin. The result does not depend on device, sample, or whether
    the native kernels, once loaded, do it. Half types are ranked as float32; ``-0.0`` equals ``0.0``.

    Args:
        scores: any shape, floating; a nan ranks above infinity.
        count: how many to choose, from 0 to the number of candidates.
        among: bool, the shape of ``scores``; True where a score is a candidate.

    Returns:
        A bool mask of the shape of ``scores`` with exactly ``count`` True, all of them candidates.

    Raises:
        ValueError: there are fewer candidates than ``count``, or ``count`` is negative.

    Example:
        >>> top(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2, torch.tensor([True, True, True, True])).tolist()
        [True, False, True, False]
    """
    return _top(scores, count, among, int(among.count_nonzero()))


def drop(scores: Tensor, active: Tensor, count: int) -> Tensor:
    """The active connections that stay when the ``count`` of lowest score are dropped; shapes as in `top`."""
    available = int(active.count_nonzero())
    return _top(scores, available - count, active, available)


def grow(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """``kept`` and the ``count`` connections of highest score outside it; shapes as in `top`."""
    return top(scores, count, ~kept).logical_or_(kept)


def _top(scores: Tensor, count: int, among: Tensor, available: int) -> Tensor:
    if not 0 <= count <= available:
        raise ValueError(f"asked to select {count} of {available} candidates; the count must lie within them")
    if count in (0, available):
        return among.clone() if count else torch.zeros_like(among)
    kernels = library.loaded()
    if kernels is not None and topology_calls.suits(scores):
        return topology_calls.top(kernels, scores, count, among)
    flat = scores.detach().reshape(-1)
    likely = _likely(flat, count, among.reshape(-1), available)
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    chosen[likely] = _highest(flat[likely], count)
    return chosen.view(scores.shape)


def _likely(scores: Tensor, count: int, among: Tensor, available: int) -> Tensor:
    """Indices, in order, of candidates that include the ``count`` highest; in a large layer not many more."""
    stride = scores.numel() // _SAMPLE | 1  # odd, so that it does not follow the rows
    if stride > 15 and count < available // 2:  # else a bound would spare little
        sample = scores[::stride][among[::stride]].float()
        expected = count * sample.numel() / available
        rank = int(expected + 5 * math.sqrt(expected) + 10)  # safely below the threshold
        if rank < sample.numel():
            bound = sample.topk(rank + 1).values[-1].to(scores.dtype)
            likely = (~(scores < bound) & among).nonzero().view(-1)
            if likely.numel() >= count:
                return likely
    return among.nonzero().view(-1)


def _highest(scores: Tensor, count: int) -> Tensor:
    """A bool over the scores: the ``count`` highest, of equal ones the first."""
    keys = _ordered_bits(scores)
    shift = keys.element_size() * 8 - _DIGIT
    digits = (keys >> shift).add_(1 << (_DIGIT - 1))  # the upper digit is signed
    above, threshold = _threshold(digits, count)
    chosen = digits > threshold
    tied = (digits == threshold).nonzero().view(-1)  # these share all digits seen so far with the threshold
    while shift > 0 and len(tied) > count - above:
        count -= above
        width = min(shift, _DIGIT)
        shift -= width
        digits = (keys[tied] >> shift) & ((1 << width) - 1)
        above, threshold = _threshold(digits, count)
        chosen[tied[digits > threshold]] = True
        tied = tied[digits == threshold]
    chosen[tied[: count - above]] = True
    return chosen


def _ordered_bits(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: int64 for float64, int32 for all other types."""
    wide = scores.dtype == torch.float64
    scores = scores if wide else scores.float()
    bits = scores.view(torch.int64 if wide else torch.int32)
    if bits.amin() >= 0:  # no sign bit anywhere: they are in order as they are
        return bits
    plain = torch.where(scores.isnan(), torch.nan, scores + 0.0)  # a nan has no sign, -0.0 becomes 0.0
    bits = plain.view(bits.dtype)
    return bits ^ ((bits >> (63 if wide else 31)) & torch.iinfo(bits.dtype).max)


def _threshold(digits: Tensor, count: int) -> tuple[int, int]:
    """How many digits are above that of the ``count``-th highest, and that digit."""
    reached = torch.bincount(digits, minlength=1 << _DIGIT).flip(0).cumsum(0)  # this digit or a higher one
    place = int((reached < count).sum())
    return int(reached[place - 1]) if place else 0, (1 << _DIGIT) - 1 - place
