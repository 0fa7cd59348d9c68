"""Methods that do something at every step, and updates that follow the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rigl.methods.base import Method, Moment
from lightning_rigl.model import latent
from lightning_rigl.model.moments import at_rate
from lightning_rigl.model.sparse_layer import SparseLayer
from lightning_rigl.topology.schedules import UpdateSchedule


class AroundStep:
    """What a step of the optimizer is surrounded by, beside the masking of gradients.

    Args:
        method: what it does at each step.
        seed: of its randomness.
        update: updates the topology of an optimizer's layers.
        count: takes note of an update of layers that is done.
    """

    def __init__(
        self,
        method: Method,
        seed: int,
        update: Callable[[Optimizer, Moment], None],
        count: Callable[[Sequence[SparseLayer], Moment], None],
    ) -> None:
        self._method, self.seed, self._update, self._count = method, seed, update, count
        self._after: Callable[[], None] | None = None  # what follows the optimizer's step
        self._hook: Any = None  # that calls it
        self._inside: Sequence[SparseLayer] = ()  # whose step is prepared, and what follows it not done
        self._disturbed: dict[SparseLayer, tuple[Tensor, Any]] = {}  # the weight at rest, and a hook
        self._asked = not method.has("disturb")  # whether it has ever been asked to

    @staticmethod
    def needed(method: Method, schedule: UpdateSchedule | None) -> bool:
        """Whether the method or the schedule asks for more than updates in place of a step."""
        questions = any(method.has(question) for question in ("observe", "disturb", "settle"))
        return questions or method.latent or (schedule is not None and schedule.policy == "after_step")

    def before_step(
        self, optimizer: Optimizer, own: Sequence[SparseLayer], moment: Moment, skips: bool
    ) -> None:
        """Show the layers to the method; prepare what follows the step, if an update does not skip it.

        Raises:
            RuntimeError: nobody calls `disturb`, and the method would be another one.
        """
        if not self._asked:
            raise RuntimeError(
                f"{type(self._method).__name__} disturbs the weights of each training step: call "
                "sparsifier.before_forward(step) before its forward pass"
            )
        seed = self.seed
        self.rest(own)
        if self._method.has("observe"):
            for layer in own:
                self._method.observe(layer.connections(seed, moment.step, layer.gradient), moment)
        if skips:
            return
        if moment.due and self._method.gradient != "never":
            for layer in own:
                if layer.kept is None and layer.held_out is None:
                    layer.keep_gradient()
        self._inside = own
        if self._method.latent:
            latent.pull(own, self._method, moment.step, seed)
        self._after = partial(self._follow, optimizer, own, moment)
        self._hook = optimizer.register_step_post_hook(lambda *_: self.after_step())

    def after_step(self) -> None:
        """Do what follows the optimizer's step, once; also where a scaler has left the step out."""
        if self._after is not None:
            after, self._after = self._after, None
            self._hook.remove()
            after()

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, own: Sequence[SparseLayer], moment: Moment) -> None:
        seed = self.seed
        if self._method.has("settle"):
            for layer in own:
                seen, now = layer.connections(seed, moment.step), at_rate(moment, optimizer, layer)
                layer.parameter.copy_(self._method.settle(seen, now))
        if self._method.latent:
            latent.push(own)
            latent.project(own, self._method, moment, seed)
            if moment.due:
                self._count(own, moment)
        elif moment.due:
            self._update(optimizer, moment)
        for layer in own:
            layer.forget_gradients()
        self._inside = ()

    @torch.no_grad()
    def abandon(self) -> None:
        """Undo what was done to the weights for a step that is not completed."""
        self.rest()
        if self._method.latent:
            latent.restore(self._inside, self._method, self.seed)
        self.forget()

    def forget(self) -> None:
        """Drop what was prepared for a step, and leave the weights as they are: others have been loaded."""
        for _, hook in self._disturbed.values():
            if hook is not None:
                hook.remove()
        if self._hook is not None:
            self._hook.remove()
        for layer in self._inside:
            layer.forget_gradients()
        self._disturbed, self._inside, self._after, self._hook = {}, (), None, None

    def put_at_rest(self, state: dict[str, Any]) -> None:
        """Replace what a step has done to the weights in a state dict, and leave the weights as they are.

        Args:
            state: name -> tensor; of the weights those that share their memory are replaced, also by the name
                of a tied one.
        """
        rest = {layer: weight for layer, (weight, _) in self._disturbed.items()}
        if self._method.latent:
            rest |= latent.weights(self._inside, self._method, self.seed)
        places = {(layer.parameter.data_ptr(), weight.shape): weight for layer, weight in rest.items()}
        for name, value in state.items() if places else ():
            if isinstance(value, Tensor):
                state[name] = places.get((value.data_ptr(), value.shape), value)

    @torch.no_grad()
    def disturb(self, layers: Sequence[SparseLayer], step: int) -> None:
        """Multiply weights and gradients by the method's factors, for the passes of a training step."""
        self._asked = True
        for layer in layers if self._method.has("disturb") and not self._disturbed else ():
            seen = layer.connections(self.seed, step)
            factors = self._method.disturb(seen).to(layer.parameter.dtype)
            hook = None
            if layer.parameter.requires_grad:
                hook = layer.parameter.register_hook(factors.mul)  # type: ignore[no-untyped-call]
            self._disturbed[layer] = layer.parameter.detach().clone(), hook
            layer.parameter.mul_(factors)

    @torch.no_grad()
    def rest(self, own: Sequence[SparseLayer] | None = None) -> None:
        """Put the weights back."""
        for layer in list(self._disturbed) if own is None else [x for x in own if x in self._disturbed]:
            weight, hook = self._disturbed[layer]
            layer.parameter.copy_(weight)
            if hook is not None:
                hook.remove()
            del self._disturbed[layer]  # after all is done: an interrupt may come between
