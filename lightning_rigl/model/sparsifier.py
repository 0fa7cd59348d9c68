"""The masks of one model, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.compute import mode
from lightning_rigl.methods.base import Method, Moment
from lightning_rigl.model import (
    initial_masks,
    latent,
    layers,
    looking,
    mask_files,
    optimizer_state,
    sharding,
    sparse_init,
)
from lightning_rigl.model.around_step import AroundStep
from lightning_rigl.model.grown import INITIAL, grown, refuse_growth
from lightning_rigl.model.moments import moment_of
from lightning_rigl.model.new_masks import new_masks
from lightning_rigl.model.sparse_layer import SparseLayer, SparseLayers, last_update
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.growth import Growth
from lightning_rigl.topology.patterns import Pattern
from lightning_rigl.topology.schedules import Timetable, UpdateSchedule
from lightning_rigl.topology.tables import Table, density_table

_PLAIN = ("updates", "drop_fraction", "seed", "mixing", "numbers")  # saved as they are


class Sparsifier:
    """Keeps a model sparse and updates its topology, in any training loop.

    The masks start here; the weights of inactive connections become and stay exactly zero. Call `start` once
    the length of training is known, `before_step` between ``backward`` and ``optimizer.step``, and
    `after_step` after it; for CigL also `before_forward` before the forward pass. Parameters are changed in
    place and never replaced; the model's ``state_dict`` keeps its keys.

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
        growth: what new connections are worth.
        rescale: multiply the initial weights for the masks, see `sparse_init.rescale`; None leaves them.
        compute: how linear layers on the CPU compute between `start` and `release`: ``dense``, or by products
            that skip the zeros, ``native``, ``torch`` or the better one, ``auto``.

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
        growth: Growth | None = None,
        rescale: sparse_init.How | None = None,
        compute: mode.Compute = "dense",
    ) -> None:
        mode.check(compute)
        distribution = Distribution.of(distribution)
        self.model = model
        self.method = Method.of(method)
        self.growth = Growth() if growth is None else growth
        refuse_growth(self.method, self.growth)
        self.pattern = Pattern.of(pattern)
        latent.refuse_pattern(self.method, self.pattern)
        self.identity = mask_files.identity(
            sparsity, self.method, distribution, self.pattern, include, exclude
        )
        self.schedule = schedule if schedule and self.method.schedule else self.method.schedule
        self.seed = torch.initial_seed() if seed is None else seed
        masks, targets = initial_masks.first_masks(
            model, sparsity, distribution, self.pattern, include, exclude, init, self.seed, self.method
        )
        parameters = layers.named_parameters(model)
        initial_masks.refuse_shards(parameters, masks, self.method, self.growth)
        initial = self._initial_values(parameters, masks, rescale)
        self.layers = SparseLayers(parameters, masks)
        self.frozen = layers.frozen(model, include, exclude)
        self.updates = 0
        self.drop_fraction = 0.0  # of the last update
        self.postponed = 0  # updates put off because a gradient was not finite, or there was none
        self.mixing = False  # whether an optimizer moves inactive weights, so that they are masked each step
        self.timetable: Timetable | None = None
        self.numbers: dict[str, dict[str, float]] = {}  # what is kept of each optimizer's layers
        self._zeros_unchecked = True  # until an optimizer has made a step
        after = self.schedule is not None and self.schedule.policy == "after_step"
        self._reads = self.method.gradient != "never" or not after  # gradients that an update waits for
        self._stepped = False  # the last step was an optimizer's, no update
        self._around: AroundStep | None = None
        if AroundStep.needed(self.method, self.schedule):
            self._around = AroundStep(self.method, self.seed, self.update, self.count_update)
        for name, layer in self.layers.items():
            layer.target = targets[name]
            layer.notes.update({INITIAL: initial[name]} if name in initial else {})
        if self.method.latent:
            latent.begin(list(self.layers.values()), self.method, self.seed)
        self.compute = mode.SparseCompute(model, self.layers, compute)

    def _initial_values(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        rescale: sparse_init.How | None,
    ) -> dict[str, Tensor]:
        """Rescale the weights, if asked to; copies of the values that new connections are to have."""
        initial = {name: parameters[name].detach().clone() for name in masks if self.growth.values == INITIAL}
        if rescale is not None:
            sparse_init.refuse(self.method, rescale)
            sparse_init.rescale_weights(self.model, parameters, masks, rescale, initial)
        return initial

    @property
    def masks(self) -> dict[str, Tensor]:
        """Cleaned parameter name -> bool tensor, True = active; they change in place."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Cleaned name -> the sparse parameters."""
        return {name: layer.parameter for name, layer in self.layers.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Cleaned name -> active connections."""
        return {name: layer.count for name, layer in self.layers.items()}

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
            for layer in self.layers.values():
                layer.last = step - 1
        self.layers.check_agreement()
        self.engage(step)

    def engage(self, step: int | None = 0) -> None:
        """Let the layers compute as it was chosen; `start` does it.

        Args:
            step: optimizer steps already done.
        """
        self.compute.begin()
        self._expect(list(self.layers.values()), step or 0, None)

    def release(self) -> None:
        """Let the layers compute densely again, by their own classes; the masks stay."""
        self.compute.end()

    @property
    def needs_look(self) -> bool:
        """Whether the method is to score the connections, by `look`, before the next step."""
        if self.updates or not self.method.has("look"):
            return False
        return not any(looking.SCORE in layer.notes for layer in self.layers.values())

    def look(
        self,
        loss: Callable[[nn.Module], Tensor],
        example: Tensor | None = None,
        twin: nn.Module | None = None,
    ) -> None:
        """Let the method score all connections before the first step, if it does that (GraSP, SynFlow).

        The model is not touched: a copy is scored, and random numbers are drawn apart. Scores are averaged
        over the processes of a distributed run. Once an update has been made, or scores are known, it does
        nothing.

        Args:
            loss: a copy of the model -> its loss on the first batch, with a graph.
            example: the floating input of that batch, of one sample or more.
            twin: a copy of the model that may be changed; None makes one.

        Raises:
            ValueError: the scores do not fit the layers or are not finite; nothing has been changed then.

        Example:
            >>> model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
            >>> sparsifier = Sparsifier(model, 0.75, method="grasp")
            >>> sparsifier.start()
            >>> sparsifier.look(lambda model: model(x).square().mean(), example=x)
            >>> sparsifier.needs_look
            False
        """
        if self.needs_look:
            twin = looking.copied(self.model) if twin is None else twin
            targets = {name: layer.target for name, layer in self.layers.items()}
            for name, score in looking.first_scores(twin, self.method, targets, loss, example).items():
                self.layers[name].notes[looking.SCORE] = score

    def reset_state(self, optimizer: Optimizer) -> None:
        """Make an optimizer's state fresh where connections are inactive, in case it has trained densely."""
        inactive = {layer.parameter: layer.inactive() for layer in self.layers.of(optimizer)}
        optimizer_state.reset(optimizer, {} if self.method.latent else inactive)

    def is_due(self, optimizer: Optimizer, step: int, clock: float | None = None) -> bool:
        """Whether `before_step` would update the topology, if the gradients are finite."""
        return self._due(self.layers.of(optimizer), step, clock)

    def sees_gradient(self, optimizer: Optimizer, step: int, clock: float | None = None) -> bool:
        """Whether `before_step` would show a gradient to the method, or look whether it is finite."""
        sees = self.method.has("observe") or self.method.latent
        return sees or self.is_due(optimizer, step, clock)

    def expect(self, optimizer: Optimizer, step: int, clock: float | None = None) -> None:
        """Before a backward pass: see to it that the gradient is dense if this step needs it.

        `before_step` does it for the step that follows; to be called where steps are not counted one by one.
        An update that meets a gradient of active connections only is postponed.
        """
        self._expect(self.layers.of(optimizer), step, clock)

    def _expect(self, own: Sequence[SparseLayer], step: int, clock: float | None) -> None:
        sees = self.method.latent or self.method.has("observe") or self._due(own, step, clock)
        mode.expect(own, sees and self.method.gradient != "never")

    def _due(self, own: Sequence[SparseLayer], step: int, clock: float | None) -> bool:
        if self.timetable is None and self.schedule is not None:
            raise RuntimeError("call start() before the first step, so that the schedule is known in steps")
        return self.timetable is not None and self.timetable.due(step, last_update(own, step), clock)

    def before_step(self, optimizer: Optimizer, step: int, clock: float | None = None) -> bool:
        """Update the topology if that is due, else mask the gradients; call it before ``optimizer.step()``.

        An update (then it gives True) takes the place of the optimizer step: all gradients of the optimizer
        become None, so that the step that follows changes nothing; where the schedule says so, it follows
        that step. One that meets a non-finite gradient, or none at all, is postponed; a step whose update is
        done (in a resumed run) changes nothing.

        Args:
            optimizer: the one about to step; only the layers among its parameters are touched.
            step: optimizer steps already done (with several optimizers, this one's own).
            clock: the time by which the schedule's ``end`` is told; None is ``step``.

        Raises:
            RuntimeError: before `start`; without `before_forward`, if the method disturbs the weights; or
                processes of a distributed run have come to different masks.
        """
        own = self.layers.of(optimizer)
        due = self._due(own, step, clock) and not (self.method.gradient != "never" and mode.is_partial(own))
        mode.stepped(own)
        mode.attach(optimizer, () if self.method.latent else own, self.growth)
        if due and self._reads and not self._gradients_serve(own):
            self.postponed += 1
            due = False
        skips = due and self.timetable is not None and self.timetable.policy == "skip_step"
        skips = skips and not self.method.latent  # its updates follow a step of the variables
        self._stepped = not skips
        if own and last_update(own, step) == step:
            _drop_gradients(optimizer)
            return False
        if own and (self._around or skips):
            moment = moment_of(optimizer, own[0], (step, clock), due, self.timetable, self.numbers)
            if self._around:
                self._around.before_step(optimizer, own, moment, skips)
        if skips:
            self.update(optimizer, moment)
            _drop_gradients(optimizer)
        elif not self.method.latent:
            self.mixing = self.mixing or optimizer_state.mixes_coordinates(type(optimizer))  # type: ignore[arg-type]  # every class is hashable
            for layer in own:
                layer.mask_gradient()
        for layer in own if skips or not due else ():
            layer.forget_gradients()
        if self.schedule is not None:
            self._expect(own, step + 1, None if clock is None else clock + 1)
        return due

    def mask_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients of inactive connections; `before_step` does it on every ordinary step."""
        for layer in self.layers.of(optimizer):
            layer.mask_gradient()

    def keep_gradients(self, optimizer: Optimizer) -> None:
        """Keep what the method sees, until the next `before_step`, and mask what may be clipped before."""
        for layer in self.layers.of(optimizer):
            layer.keep_gradient()
            layer.mask_gradient()

    def restore_gradients(self, optimizer: Optimizer) -> None:
        """Unmask the gradients that were kept, if another backward pass adds to them."""
        for layer in self.layers.of(optimizer):
            layer.restore_gradient()

    def before_forward(self, step: int) -> None:
        """Disturb the weights for a training step, if the method does; step: optimizer steps done."""
        if self._around:
            self._around.disturb(list(self.layers.values()), step)

    def after_step(self) -> None:
        """Restore the zeros if an optimizer moves inactive weights; checks for that after the first step."""
        if self._around:
            self._around.after_step()
            self._around.rest()
        if self._zeros_unchecked and self._stepped:
            self._zeros_unchecked = False
            self.check_zeros()
        elif self.mixing:
            self.mask_weights()

    def leave_step(self, loaded: bool = False) -> None:
        """Leave a step that an exception has come into: the weights are those before it, undisturbed.

        Args:
            loaded: other weights have been loaded since; they stay as they are.
        """
        if self._around:
            (self._around.forget if loaded else self._around.abandon)()

    def put_at_rest(self, state: dict[str, Any]) -> None:
        """Replace what a step has done to the weights in a state dict that shares their memory."""
        if self._around:
            self._around.put_at_rest(state)

    @torch.no_grad()
    def update(self, optimizer: Optimizer, moment: Moment) -> None:
        """Drop and grow in every layer of the optimizer.

        Optimizer state is fresh where the mask changed; connections that are dropped and grown again keep
        value and state. Of sharded parameters one layer at a time is gathered.
        """
        self.check_zeros()
        changed, new = {}, []
        own = self.layers.of(optimizer)
        for layer, before, kept, mask in new_masks(own, self.method, self.pattern, moment, self.seed):
            if self.growth != Growth():
                new.append(grown(layer, before, kept, mask, self.growth))
            changed[layer.parameter] = layer.replace(mask)
        for each in new:
            each.fill()
            changed[each.layer.parameter] |= each.where
        optimizer_state.reset(optimizer, changed)
        for each in new:
            each.remember(optimizer)
        self.count_update(own, moment)

    def count_update(self, own: Sequence[SparseLayer], moment: Moment) -> None:
        """An update of these layers is done."""
        for layer in own:
            layer.last = moment.step
            layer.notes.pop(looking.SCORE, None)  # it has served
        self.drop_fraction = moment.fraction
        self.updates += 1
        self.layers.check_agreement()

    def mask_weights(self) -> None:
        """Set the inactive weights to zero."""
        self.layers.mask_weights()

    def _gradients_serve(self, own: Sequence[SparseLayer]) -> bool:
        """Whether those that choose are finite, and there is one if the method reads them."""
        grads = [layer.chooses for layer in own]
        some = self.method.gradient == "never" or any(grad is not None for grad in grads)
        serve = some and optimizer_state.gradients_are_finite(grads)
        return sharding.everywhere(serve, own[0].parameter.device) if own else serve

    def is_current(self) -> bool:
        """Whether the model still has the parameters that the masks were made for, as they were."""
        return self.layers.is_current(layers.named_parameters(self.model))

    @torch.no_grad()
    def check_zeros(self) -> None:
        """Notice an optimizer that moves inactive weights: restore the zeros, from now on after each step."""
        self.mixing = self.mixing or self.layers.has_strays()
        if self.mixing:
            self.mask_weights()

    @property
    def density(self) -> float:
        """Active connections over all connections of the sparse layers."""
        return self.layers.density

    def summary(self) -> Table:
        """A table of the sparse layers: shape, active of total, density; what computes sparsely."""
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        title, how = f"sparse layers ({type(self.method).__name__})", self.compute.cells
        return density_table(title, shapes, self.counts, {"compute": how} if self.compute.asked else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain types and tensors: masks at one bit a weight."""
        return {
            "version": mask_files.VERSION,
            "identity": self.identity,
            "masks": mask_files.pack_masks(self.masks),
            "last": {name: layer.last for name, layer in self.layers.items()},
            "targets": {name: layer.target for name, layer in self.layers.items()},
            "notes": {name: layer.saved_notes() for name, layer in self.layers.items() if layer.notes},
            "timetable": asdict(self.timetable) if self.timetable else None,
            **{name: deepcopy(getattr(self, name)) for name in _PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model's own state before.

        Raises:
            ValueError: a state of another format, method or model; nothing has been changed then.
        """
        masks = mask_files.check_state(state, self.identity)
        mask_files.check_masks(masks, self.parameters, self.method.scope == "model")
        if missing := self.layers.keys() - masks.keys():
            raise ValueError(f"masks do not fit the model: there are none for {', '.join(sorted(missing))}")
        if self.growth.values == INITIAL and not all(
            INITIAL in state["notes"].get(n, {}) for n in self.layers
        ):
            raise ValueError(
                "growth='initial' gives new connections their first values, and the run that is resumed has "
                "not kept them: go on with the growth that it had, or begin anew with init=<its checkpoint>"
            )
        for name, layer in self.layers.items():
            layer.replace(masks[name])
            layer.last, layer.target = state["last"][name], state["targets"][name]
            layer.take_notes(state["notes"].get(name, {}))
        for name in _PLAIN:
            setattr(self, name, deepcopy(state[name]))
        self.leave_step(loaded=True)
        if self.method.latent:
            latent.restore(list(self.layers.values()), self.method, self.seed)
        self.timetable = Timetable(**state["timetable"]) if state["timetable"] else None
        if self._around:
            self._around.seed = self.seed


def _drop_gradients(optimizer: Optimizer) -> None:
    """Make the step that follows change nothing: no momentum, no decay, no count."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
