"""The closed forms of appendix H: FLOPs per sample of a training step, as a mean over an endless run.

Everything is exact: integers in, integers or `fractions.Fraction` out. Only `training_ratios` rounds, to
floats. What a run of a known length costs by its real schedule is in `runs`.

Reference:
    Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, appendix H.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from lightning_rigl.flops.formulas import step_cost


def static(forward: int) -> int:
    """3 f_S: a fixed mask, SET and SNIP; random growth and SNIP's one dense gradient are not counted.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.

    Example:
        >>> static(53242)
        159726
    """
    return step_cost(forward, forward, dense_gradient=False)


def snfs(forward: int, forward_dense: int) -> int:
    """2 f_S + f_D: the gradient of every weight is needed at each step.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.
        forward_dense: f_D, the same of the dense model.

    Reference:
        Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, arXiv:1907.04840.

    Example:
        >>> snfs(53242, 532400)
        638884
    """
    return step_cost(forward, forward_dense, dense_gradient=True)


def rigl(forward: int, forward_dense: int, every: int = 100) -> Fraction:
    """(3 f_S dT + 2 f_S + f_D) / (dT + 1): one update after each dT ordinary steps.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.
        forward_dense: f_D, the same of the dense model.
        every: dT, steps between updates, at least 1.

    Raises:
        ValueError: ``every`` is less than 1.

    Example:
        >>> rigl(53242, 532400, every=99)
        Fraction(8225879, 50)
    """
    if every < 1:
        raise ValueError(f"every: the steps between two updates, at least 1, got {every}")
    return Fraction(static(forward) * every + snfs(forward, forward_dense), every + 1)


def gradual_pruning(
    forward: int,
    forward_dense: int,
    total: int = 32_000,
    begin: int = 10_000,
    end: int = 25_000,
    every: int = 1_000,
) -> Fraction:
    """Mean of 3 f(s_t) while each layer's sparsity rises to its final one s as s (1 - (1 - p)^3).

    p runs from 0 at ``begin`` to 1 at ``end``. As in the official notebook the mean is taken over the moments
    0, every, 2 every, ... up to and including ``total``. The defaults are the paper's runs on ImageNet; only
    their proportions matter.

    Args:
        forward: f_S, FLOPs per sample of the forward pass at the final sparsity.
        forward_dense: f_D, the same of the dense model.
        total: steps of training.
        begin: step of the first pruning.
        end: step of the last one.
        every: steps between prunings.

    Raises:
        ValueError: not 0 <= begin < end <= total, or ``every`` is less than 1.

    Reference:
        Zhu and Gupta, *To prune, or not to prune*, arXiv:1710.01878.

    Example:
        ResNet-50 at 80 %, uniform: the published .56.

        >>> round(float(gradual_pruning(2254, 10_000)) / 30_000, 4)
        0.5603
    """
    if not 0 <= begin < end <= total or every < 1:
        raise ValueError(
            f"gradual pruning needs 0 <= begin < end <= total and every >= 1, got begin={begin}, end={end}, "
            f"total={total}, every={every}"
        )
    moments = range(0, total + 1, every)
    left = sum(
        (end - min(max(t, begin), end)) ** 3 for t in moments
    )  # (1 - p)^3, in units of (end - begin)^3
    still_dense = Fraction(left, len(moments) * (end - begin) ** 3)
    return 3 * (forward + (forward_dense - forward) * still_dense)


def mean_step(
    forward: int, forward_dense: int, gradient: Literal["never", "at_updates", "every_step"], every: int
) -> Fraction:
    """The closed form of a method that reads the dense gradient ``never``, ``at_updates`` or ``every_step``.

    Example:
        >>> mean_step(10, 100, "never", 1), mean_step(10, 100, "at_updates", 1)
        (Fraction(30, 1), Fraction(75, 1))
    """
    if gradient == "at_updates":
        return rigl(forward, forward_dense, every)
    return Fraction(static(forward) if gradient == "never" else snfs(forward, forward_dense))


def training_ratios(forward: int, forward_dense: int, every: int = 100) -> dict[str, float]:
    """The training FLOPs of every method as a share of the dense model's 3 f_D.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.
        forward_dense: f_D, the same of the dense model; if it is 0, all shares are 1.
        every: steps between RigL's updates.

    Example:
        >>> {method: round(ratio, 4) for method, ratio in training_ratios(10, 100).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'static': 0.1, 'set': 0.1, 'snip': 0.1, 'rigl': 0.103, 'snfs': 0.4, 'gradual_pruning': 0.4891,
         'dense': 1.0}
    """
    costs = {
        **dict.fromkeys(("static", "set", "snip"), Fraction(static(forward))),
        "rigl": rigl(forward, forward_dense, every),
        "snfs": Fraction(snfs(forward, forward_dense)),
        "gradual_pruning": gradual_pruning(forward, forward_dense),
        "dense": Fraction(static(forward_dense)),
    }
    return {
        method: float(cost / static(forward_dense)) if forward_dense else 1.0
        for method, cost in costs.items()
    }
