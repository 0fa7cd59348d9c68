"""The masks of one model, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.methods.base import Method, runnable
from lightning_rigl.model import initial_masks, layers, mask_files, optimizer_state
from lightning_rigl.model.new_mask import new_mask
from lightning_rigl.topology import bits
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.patterns import Pattern
from lightning_rigl.topology.schedules import Timetable, UpdateSchedule
from lightning_rigl.topology.tables import Table, density_table

_PLAIN = ("updates", "drop_fraction", "seed", "mixing")  # saved as they are


class Sparsifier:
    """Keeps a model sparse and updates its topology, in any training loop.

    The masks start here; the weights of inactive connections become and stay exactly zero. Call `start` once
    the length of training is known, `before_step` between ``backward`` and ``optimizer.step``, and
    `after_step` after it. Parameters are changed in place and never replaced; the model's ``state_dict``
    keeps its keys.

    Args:
        model: any module, on its device.
        sparsity: fraction of zeros over the sparse layers, in [0, 1); or regular expression (searched in the
            parameter name, first match wins) -> sparsity of that layer, unmatched layers staying dense.
        method: who decides what is dropped and grown, or its short name.
        distribution: how the connections are shared between layers, or its short name.
        schedule: when the topology is updated; None is the method's own default.
        pattern: where connections may live, or its short name.
        include: regular expressions that replace the default choice of parameters, see `layers.select`.
        exclude: regular expressions of parameters that stay dense.
        init: ``random`` masks, those of largest ``magnitude``, the ``nonzero`` weights as they are, the path
            of a checkpoint or mask file, or masks (cleaned parameter name -> bool tensor). Given masks and
            the non-zeros decide the counts themselves.
        seed: of all randomness here; None is ``torch.initial_seed()``. The global generator is never used.

    Raises:
        ValueError: bad input; nothing has been changed then. The message names the way out.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = Sparsifier(model, 0.75, schedule=UpdateSchedule(every=2, end=8), seed=0)
        >>> sparsifier.start(total_steps=10)
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     _ = sparsifier.before_step(optimizer, step)
        ...     _ = optimizer.step()
        ...     sparsifier.after_step()
        >>> sparsifier.updates, sparsifier.counts, round(sparsifier.density, 3)
        (3, {'0.weight': 27, '2.weight': 22}, 0.255)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | dict[str, float] = 0.9,
        method: Method | str = "rigl",
        distribution: Distribution | str = "erk",
        schedule: UpdateSchedule | None = None,
        pattern: Pattern | str = "unstructured",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        init: str | Mapping[str, Tensor] = "random",
        seed: int | None = None,
    ) -> None:
        distribution = Distribution.of(distribution)
        self.model = model
        self.method = runnable(Method.of(method))
        self.pattern = Pattern.of(pattern)
        self.identity = mask_files.identity(
            sparsity, self.method, distribution, self.pattern, include, exclude
        )
        self.schedule = schedule if schedule and self.method.schedule else self.method.schedule
        self.seed = torch.initial_seed() if seed is None else seed
        self.masks = initial_masks.first_masks(
            model, sparsity, distribution, self.pattern, include, exclude, init, self.seed
        )
        everything = layers.named_parameters(model)
        self.parameters = {name: everything[name] for name in self.masks}
        self.frozen = layers.frozen(model, include, exclude)
        self.updates = 0
        self.drop_fraction = 0.0  # of the last update
        self.postponed = 0  # updates put off because a gradient was not finite
        self.mixing = False  # whether an optimizer moves inactive weights, so that they are masked each step
        self.timetable: Timetable | None = None
        self._last = dict.fromkeys(self.masks, -1)  # the step of each layer's last update
        self._zeros_unchecked = True  # until an optimizer has made a step
        self._stepped = False  # the last step was an optimizer's, no update
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._apply_masks()

    def start(self, total_steps: int | None = None, step: int | None = 0) -> None:
        """Begin a training: resolve the schedule's fractions.

        Args:
            total_steps: the length of training in optimizer steps; None if unknown.
            step: optimizer steps already done, so that updates due before count as past; None goes on after
                the updates that were done.

        Raises:
            ValueError: the schedule needs the length of training, and it is unknown.
        """
        self.timetable = self.schedule.resolve(total_steps) if self.schedule else None
        if step is not None:
            self._last = dict.fromkeys(self.masks, step - 1)

    def reset_state(self, optimizer: Optimizer) -> None:
        """Make an optimizer's state fresh where connections are inactive, in case it has trained densely."""
        inactive = {self.parameters[name]: ~self.masks[name] for name in self._names_in(optimizer)}
        optimizer_state.reset(optimizer, inactive)

    def before_step(self, optimizer: Optimizer, step: int) -> bool:
        """Update the topology if that is due, else mask the gradients; call it before ``optimizer.step()``.

        An update takes the place of the optimizer step: all gradients of the optimizer become None, so that
        the step that follows changes nothing. An update that meets a non-finite gradient is postponed.

        Args:
            optimizer: the one about to step; only the layers among its parameters are touched.
            step: optimizer steps already done (with several optimizers, this one's own).

        Returns:
            Whether the topology was updated.

        Raises:
            RuntimeError: `start` has not been called, so that the schedule is not known in steps.
        """
        if self.timetable is None and self.schedule is not None:
            raise RuntimeError("call start() before the first step, so that the schedule is known in steps")
        names = self._names_in(optimizer)
        last = max((self._last[name] for name in names), default=step)
        due = self.timetable is not None and self.timetable.due(step, last)
        if due and not optimizer_state.gradients_are_finite(self.parameters[name] for name in names):
            self.postponed += 1
            due = False
        self._stepped = not due
        if due:
            self.update(optimizer, step)
        else:
            self.mixing = self.mixing or optimizer_state.mixes_coordinates(type(optimizer))  # type: ignore[arg-type]  # every class is hashable
            self._mask_gradients(names)
        return due

    def after_step(self) -> None:
        """Restore the zeros if an optimizer moves inactive weights; checks for that after the first step."""
        if self._zeros_unchecked and self._stepped:
            self._zeros_unchecked = False
            self.check_zeros()
        elif self.mixing:
            self.mask_weights()

    @torch.no_grad()
    def update(self, optimizer: Optimizer, step: int) -> None:
        """Drop and grow in every layer of the optimizer, in place of its step.

        Newly grown weights are zero. The optimizer's state becomes fresh where the mask changed; connections
        that are dropped and grown again keep value and state.
        """
        self.check_zeros()
        self.drop_fraction = self.timetable.fraction(step) if self.timetable else 0.0
        changed = {}
        for name in self._names_in(optimizer):
            self._last[name] = step
            parameter, count = self.parameters[name], int(self.drop_fraction * self.counts[name])
            if count > 0 and self.counts[name] < parameter.numel():
                generator = initial_masks.private_generator(self.seed, name, step)
                mask = new_mask(parameter, self.masks[name], count, self.method, self.pattern, generator)
                changed[parameter] = self._replace_mask(name, mask)
        optimizer_state.reset(optimizer, changed)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.updates += 1

    def _replace_mask(self, name: str, mask: Tensor) -> Tensor:
        """Put a new mask in place; returns where it changed. Dropped weights become zero, new ones are it."""
        changed = self.masks[name] ^ mask
        self.masks[name].copy_(mask)
        self._integers[name].copy_(mask).neg_()
        bits.and_(self.parameters[name].detach(), self._integers[name])
        return changed

    def mask_weights(self) -> None:
        """Set the inactive weights to zero."""
        for name, integers in self._integers.items():
            bits.and_(self.parameters[name].detach(), integers)

    def _mask_gradients(self, names: Sequence[str]) -> None:
        """Zero the gradients of inactive connections, so that clipping and momentum see none of them."""
        for name in names:
            grad = self.parameters[name].grad
            if grad is not None and name in self._integers:
                bits.and_(grad, self._integers[name])

    def _apply_masks(self) -> None:
        """Count the masks, make their integer form (full layers need none), and mask the weights."""
        self.counts = {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}
        partial = [name for name, mask in self.masks.items() if self.counts[name] < mask.numel()]
        self._integers = {n: bits.integer_mask(self.masks[n], self.parameters[n].detach()) for n in partial}
        self.mask_weights()

    def _names_in(self, optimizer: Optimizer) -> list[str]:
        names = self._names
        return [names[p] for group in optimizer.param_groups for p in group["params"] if p in names]

    def is_current(self) -> bool:
        """Whether the model still has the parameters that the masks were made for, as they were."""
        now = layers.named_parameters(self.model)
        return all(
            now.get(name) is parameter
            and self.masks[name].device == parameter.device
            and (
                name not in self._integers or self._integers[name].element_size() == parameter.element_size()
            )
            for name, parameter in self.parameters.items()
        )

    @torch.no_grad()
    def check_zeros(self) -> None:
        """Notice an optimizer that moves inactive weights: restore the zeros, from now on after each step."""
        if any(((p != 0) > self.masks[name]).count_nonzero() for name, p in self.parameters.items()):
            self.mixing = True
        if self.mixing:
            self.mask_weights()

    @property
    def density(self) -> float:
        """Active connections over all connections of the sparse layers."""
        return sum(self.counts.values()) / sum(mask.numel() for mask in self.masks.values())

    def summary(self) -> Table:
        """A table of the sparse layers: shape, active of total, density."""
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        return density_table(f"sparse layers ({type(self.method).__name__})", shapes, self.counts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain types and tensors: masks at one bit a weight."""
        return {
            "version": mask_files.VERSION,
            "identity": self.identity,
            "masks": mask_files.pack_masks(self.masks),
            "last": dict(self._last),
            "timetable": asdict(self.timetable) if self.timetable else None,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model's own state before.

        Raises:
            ValueError: a state of another format, method or model; nothing has been changed then.
        """
        masks = mask_files.check_state(state, self.identity)
        mask_files.check_masks(masks, self.parameters)
        if missing := self.masks.keys() - masks.keys():
            raise ValueError(f"masks do not fit the model: there are none for {', '.join(sorted(missing))}")
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
        self._apply_masks()
        self._last = dict(state["last"])
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.timetable = Timetable(**state["timetable"]) if state["timetable"] else None
