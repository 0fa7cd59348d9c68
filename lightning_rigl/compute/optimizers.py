"""Optimizers whose step and state cover the active connections only; elsewhere they are torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rigl.compute.backends import NativeBackend
from lightning_rigl.compute.linear import SparseProduct
from lightning_rigl.compute.structure import Structure
from lightning_rigl.kernels import step_calls, topology_calls
from lightning_rigl.kernels.library import Library

_PER_WEIGHT = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class ActiveStep(Optimizer):
    """What `ActiveSGD` and `ActiveAdamW` share.

    The sparsifier tells which parameters compute natively, see `attach`; these are stepped, and their state
    kept, at active connections only, in row-major order. All others are stepped as torch does it. State of
    a dense run is taken over; the other way round, a resumed fit of RigLCallback makes the state dense for
    the optimizer of torch.
    """

    _plain_step: Callable[..., Any]  # torch's own, without the hooks that ours has already
    _products: Mapping[nn.Parameter, SparseProduct]
    _structures: dict[nn.Parameter, Structure]  # that the state goes with

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._products, self._structures = {}, {}

    def _begin(self, active_gradients: bool) -> None:
        self.defaults["active_gradients"] = active_gradients
        self._products, self._structures = {}, {}

    @property
    def active_gradients(self) -> bool:
        """Whether gradients of attached parameters are sparse tensors."""
        return bool(self.defaults["active_gradients"])

    def attach(self, products: Mapping[nn.Parameter, SparseProduct]) -> None:
        """From here on step these parameters natively, as long as they have these products."""
        self._products = {p: x for p, x in products.items() if isinstance(x.kernels, NativeBackend)}
        for parameter, product in self._products.items():
            product.active_gradient = self.active_gradients
            self._structures.setdefault(parameter, product.structure)  # that of a state just loaded

    def renew(self, changed: Mapping[nn.Parameter, Tensor]) -> None:
        """Follow new masks: state of connections that stay is kept, and fresh at ``changed`` positions."""
        for parameter, where in changed.items():
            product = self._products.get(parameter)
            if product is not None and self._follow(parameter, product):
                fresh = where.reshape(-1)[product.structure.places]
                for value in compacted(self.state.get(parameter, {}), parameter).values():
                    value.masked_fill_(fresh, 0.0)

    def _follow(self, parameter: nn.Parameter, product: SparseProduct) -> bool:
        """Bring the state into the order of the connections that there are now; whether there is one."""
        old, new = self._structures.get(parameter), product.structure
        self._structures[parameter] = new
        known = compacted(self.state.get(parameter, {}), parameter)
        if old is not None and old is not new:
            for key, value in known.items():
                carried = topology_calls.carry(_library(product), value, new.inputs, old.rows, new.rows)
                self.state[parameter][key] = carried
        return bool(known)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, native where a product is attached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        aside: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                product, grad = self._products.get(parameter), parameter.grad
                if grad is None:
                    continue
                if product is None:
                    self._refuse_foreign(parameter)
                    continue
                self._active_step(parameter, self._gradient(grad, product), product, group)
                aside.append((parameter, grad))
                parameter.grad = None
        try:
            type(self)._plain_step(self)
        finally:
            for parameter, grad in aside:
                parameter.grad = grad
        return loss

    @staticmethod
    def _gradient(grad: Tensor, product: SparseProduct) -> Tensor:
        if not grad.is_sparse:
            return grad.contiguous()
        values = grad._values()
        return values if len(values) == product.structure.count else grad.coalesce().values()

    def _compact(
        self, parameter: nn.Parameter, product: SparseProduct, keys: tuple[str, ...]
    ) -> list[Tensor]:
        """State of the active connections: made, or taken over from a dense run."""
        self._follow(parameter, product)
        state, found = self.state[parameter], []
        for key in keys:
            value = state.get(key)
            if value is None:
                value = parameter.new_zeros(product.structure.count)
            elif value.shape == parameter.shape:
                value = product.kernels.gather(value, product.structure)
            elif len(value) != product.structure.count:
                raise RuntimeError(
                    f"{type(self).__name__}: {key} holds {len(value)} active connections and the mask "
                    f"has {product.structure.count}; load the callback's checkpoint along with "
                    "the optimizer's"
                )
            state[key] = value
            found.append(value)
        return found

    def _refuse_foreign(self, parameter: nn.Parameter) -> None:
        for key in compacted(self.state.get(parameter, {}), parameter):
            raise RuntimeError(
                f"{type(self).__name__}: {key} covers active connections only, and the layer of shape "
                f"{tuple(parameter.shape)} computes densely now; go on with compute='native', or with a "
                "new optimizer"
            )

    def _active_step(
        self, parameter: nn.Parameter, grad: Tensor, product: SparseProduct, group: Mapping[str, Any]
    ) -> None:
        raise NotImplementedError


class ActiveSGD(ActiveStep, torch.optim.SGD):
    """`torch.optim.SGD` whose step and momentum cover the active connections only.

    Exact: bit by bit the weights of ``torch.optim.SGD(foreach=False)`` from the same gradients. Parameters
    that do not compute natively (``compute="native"``) are stepped by it.

    Args:
        params: as of `torch.optim.SGD`.
        lr: as there.
        momentum: as there.
        dampening: as there.
        weight_decay: as there.
        nesterov: as there.
        maximize: as there.
        active_gradients: let gradients be `torch.sparse_coo_tensor` between updates, so that nothing passes
            over a dense one; clipping is impossible then, in manual optimization too.

    Raises:
        ValueError: as of `torch.optim.SGD`.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> ActiveSGD(layer.parameters(), lr=0.1, momentum=0.9).defaults["momentum"]
        0.9
    """

    _plain_step = staticmethod(getattr(torch.optim.SGD.step, "__wrapped__", torch.optim.SGD.step))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        active_gradients: bool = False,
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=False
        )
        self._begin(active_gradients)

    def _active_step(
        self, parameter: nn.Parameter, grad: Tensor, product: SparseProduct, group: Mapping[str, Any]
    ) -> None:
        first = self.state[parameter].get("momentum_buffer") is None
        velocity = None
        if group["momentum"]:
            [velocity] = self._compact(parameter, product, ("momentum_buffer",))
        step_calls.sgd(
            _library(product),
            parameter.detach(),
            grad,
            velocity,
            product.structure.rows,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=first,
        )


class ActiveAdamW(ActiveStep, torch.optim.AdamW):
    """`torch.optim.AdamW` whose step and averages cover the active connections only.

    The averages are bit by bit those of ``torch.optim.AdamW(foreach=False)`` from the same gradients, the
    weights to one rounding. Parameters that do not compute natively are stepped by it.

    Args:
        params: as of `torch.optim.AdamW`.
        lr: as there.
        betas: as there.
        eps: as there.
        weight_decay: as there.
        maximize: as there.
        active_gradients: as of `ActiveSGD`.

    Raises:
        ValueError: as of `torch.optim.AdamW`.

    Example:
        >>> ActiveAdamW(nn.Linear(4, 2).parameters(), lr=0.1).defaults["betas"]
        (0.9, 0.999)
    """

    _plain_step = staticmethod(getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        active_gradients: bool = False,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, maximize=maximize, foreach=False
        )
        self._begin(active_gradients)

    def _active_step(
        self, parameter: nn.Parameter, grad: Tensor, product: SparseProduct, group: Mapping[str, Any]
    ) -> None:
        state = self.state[parameter]
        state.setdefault("step", torch.tensor(0.0, device="cpu"))
        exp_avg, exp_avg_sq = self._compact(parameter, product, ("exp_avg", "exp_avg_sq"))
        state["step"] += 1
        step_calls.adam(
            _library(product),
            parameter.detach(),
            grad,
            (exp_avg, exp_avg_sq),
            product.structure.rows,
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


def compacted(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Tensor]:
    """What of a parameter's state covers its active connections only."""
    found = {key: state[key] for key in _PER_WEIGHT if isinstance(state.get(key), Tensor)}
    return {key: value for key, value in found.items() if value.shape != parameter.shape}


def _library(product: SparseProduct) -> Library:
    assert isinstance(product.kernels, NativeBackend), "attach takes no other"
    return product.kernels.library
