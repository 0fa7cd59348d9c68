"""What a forward pass, a training step and a whole run cost, from a table of layer costs and active counts.

Everything is an exact Python integer. A FLOP is one multiply or one add; biases, norms, activations, pooling
and the loss are not counted (appendix H of the paper).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from lightning_rigl.flops.costs import Convention, CostTable


def forward_cost(
    table: CostTable, counts: Mapping[str, int] | None = None, convention: Convention = "2mac"
) -> int:
    """FLOPs of one forward pass, of as many samples as the table is for: one, as a rule.

    Args:
        table: the measured cost of the model.
        counts: active connections by parameter name, or by the key of a slice; what is not named is dense.
        convention: ``2mac`` counts two FLOPs per multiply-add; ``official`` adds one FLOP per output element
            of each layer, as the paper's own counter does.

    Raises:
        ValueError: a count outside [0, numel].

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> from lightning_rigl.flops.costs import LayerCost
        >>> table = CostTable((LayerCost("fc.weight", (10, 100), forward=2000, outputs=10),), other=64)
        >>> forward_cost(table), forward_cost(table, {"fc.weight": 50}, "official")
        (2064, 174)
    """
    return table.other + sum(layer.forward_flops(counts or {}, convention) for layer in table.layers)


def actual_step_cost(
    table: CostTable, counts: Mapping[str, int] | None = None, dense_gradient: bool = False
) -> int:
    """FLOPs of the products that really run in one training step, of as many samples as the table is for.

    That is the forward pass, the gradients of inputs that need one (the first layer's does not), those of
    weights that are trained, what activation checkpointing computes again, and forward passes with gradients
    disabled. Two FLOPs a multiply-add.

    Args:
        table: the measured cost of the model.
        counts: as for `forward_cost`.
        dense_gradient: whether the gradient of inactive connections is computed too.

    Example:
        >>> from lightning_rigl.flops.costs import LayerCost
        >>> first = LayerCost("1.weight", (300, 784), 470400, 300, 0, 470400)
        >>> second = LayerCost("2.weight", (10, 300), 6000, 10, 6000, 6000)
        >>> actual_step_cost(CostTable((first, second)))
        958800
    """
    counts = counts or {}
    total = table.other + table.other_gradient + table.other_recompute + table.other_no_gradient
    for layer in table.layers:
        repeated = layer.recompute + layer.no_gradient
        total += layer.scaled(layer.forward + layer.input_gradient + repeated, counts)
        total += layer.weight_gradient if dense_gradient else layer.scaled(layer.weight_gradient, counts)
    return total


def step_cost(forward: int, forward_dense: int, dense_gradient: bool) -> int:
    """FLOPs of one training step per sample: 3 f_S, or 2 f_S + f_D if the gradient of every weight is needed.

    The backward pass costs two forward passes: one for the gradients of the activations, one for those of
    the weights.

    Args:
        forward: f_S, FLOPs per sample of the sparse forward pass.
        forward_dense: f_D, the same of the dense model.
        dense_gradient: whether this step computes the gradient of inactive connections too.

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> step_cost(53242, 532400, dense_gradient=False), step_cost(53242, 532400, dense_gradient=True)
        (159726, 638884)
    """
    return 2 * forward + (forward_dense if dense_gradient else forward)


@dataclass(frozen=True)
class SampleCost:
    """What one sample, or several together, cost at some counts.

    Args:
        forward: f_S, the sparse forward pass.
        forward_dense: f_D, the same of the dense model.
        actual: one training step, the products that autograd runs (`actual_step_cost`).
        actual_update: the same with the gradient of every connection.
        samples: how many samples cost this.
    """

    forward: int
    forward_dense: int
    actual: int = 0
    actual_update: int = 0
    samples: int = 1

    def of(self, samples: int) -> SampleCost:
        """What another number of samples costs, in proportion; parts of a FLOP are cut off.

        Example:
            >>> SampleCost(100, 1000).of(64).forward, SampleCost(100, 1000, samples=64).of(1).forward
            (6400, 1)
        """
        share = {name: value * samples // self.samples for name, value in asdict(self).items()}
        return SampleCost(**share | {"samples": samples})

    @property
    def extra(self) -> int:
        """What the gradient of inactive connections costs, f_D - f_S."""
        return self.forward_dense - self.forward

    @property
    def actual_extra(self) -> int:
        """The same of the products that autograd runs."""
        return self.actual_update - self.actual


def sample_cost(table: CostTable, counts: Mapping[str, int], convention: Convention = "2mac") -> SampleCost:
    """What the samples that a table is for cost at these counts."""
    return SampleCost(
        forward_cost(table, counts, convention),
        forward_cost(table, {}, convention),
        actual_step_cost(table, counts),
        actual_step_cost(table, counts, dense_gradient=True),
        table.samples,
    )


def sample_cost_of(table: CostTable, counts: Mapping[str, int], names: Collection[str]) -> SampleCost:
    """What the products of some parameters cost: their part of what the table costs.

    Args:
        table: the measured cost of the model.
        counts: as for `forward_cost`.
        names: parameter names, for instance those of one optimizer of several.

    Example:
        >>> from lightning_rigl.flops.costs import LayerCost
        >>> layers = (LayerCost("a.weight", (10, 100), 2000, 10), LayerCost("b.weight", (5, 10), 100, 5))
        >>> sample_cost_of(CostTable(layers, other=64), {"b.weight": 10}, {"b.weight"}).extra
        80
    """
    layers = tuple(layer for layer in table.layers if layer.name in names)
    return sample_cost(CostTable(layers, samples=table.samples), counts)


@dataclass(frozen=True)
class RunCost:
    """What training has cost so far; each step gives the next value.

    Args:
        train: FLOPs of all samples so far, by the paper's rule: 3 f_S a step, 2 f_S + f_D at an update.
        train_dense: what the dense model would have cost for them, 3 f_D each.
        train_actual: FLOPs of the products that autograd ran for them.
        pending: what the open accumulation window would cost more, should it end with an update.
        pending_actual: the same of ``train_actual``.

    Reference:
        Evci et al., ICML 2020, arXiv:1911.11134, app. H; counted by the real schedule instead of the mean
        (3 f_S T + 2 f_S + f_D) / (T + 1).

    Example:
        Two micro-batches of 8 samples, then a topology update that reads the dense gradient of both:

        >>> run = RunCost().after(8, SampleCost(100, 1000), gradient="at_updates", stepped=False)
        >>> run.train, run.train_dense
        (2400, 24000)
        >>> run = run.after(8, SampleCost(100, 1000), gradient="at_updates", updated=True)
        >>> run.train, run.train_dense
        (19200, 48000)
    """

    train: int = 0
    train_dense: int = 0
    train_actual: int = 0
    pending: int = 0
    pending_actual: int = 0

    def after(
        self,
        samples: int,
        cost: SampleCost,
        *,
        gradient: Literal["never", "at_updates", "every_step"] = "never",
        updated: bool = False,
        stepped: bool = True,
        part: SampleCost | None = None,
    ) -> RunCost:
        """The cost after one more batch.

        Args:
            samples: samples in the batch.
            cost: what each costs, or as many of them together.
            gradient: when the method reads the gradient of inactive connections.
            updated: whether the batch ended with a topology update.
            stepped: whether it ended with an optimizer step, or an update in its place.
            part: what the layers cost whose gradient the update needs, where those are not all: the layers of
                one optimizer of several, see `sample_cost_of`.
        """
        always, cost = gradient == "every_step", cost.of(samples)
        part = part and part.of(samples)
        pending = self.pending + cost.extra
        pending_actual = self.pending_actual + cost.actual_extra
        train = self.train + step_cost(cost.forward, cost.forward_dense, always)
        actual = self.train_actual + (cost.actual_update if always else cost.actual)
        if updated and gradient == "at_updates":  # the whole window was booked as ordinary
            train += pending if part is None else pending * part.extra // max(cost.extra, 1)
            whole = max(cost.actual_extra, 1)
            actual += pending_actual if part is None else pending_actual * part.actual_extra // whole
        dense = self.train_dense + 3 * cost.forward_dense
        return RunCost(train, dense, actual, *((0, 0) if stepped else (pending, pending_actual)))
