"""A slow numpy twin of RigL, SET and Static, written from the papers and independent of the package.

RigL: Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134 (Algorithm 1, section 3).
SET: Mocanu et al., Nature Communications 2018, arXiv:1707.04780.
Where the paper is silent (rounding, ties) the rule of the authors' code holds. Everything is float64; loops
and sorted Python lists stand where speed would hide the meaning. Nothing here may import the package.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]  # layer name -> array, in layer order
Shapes = Mapping[str, tuple[int, ...]]

# --- Section 3 (1), sparsity distribution: how many connections each layer keeps ---


def n_zeros(sparsity: float, size: int) -> int:
    """The authors' rounding: floor(s_l * N_l) in double precision."""
    return math.floor(sparsity * size)


def uniform_counts(shapes: Shapes, sparsity: float, dense_first: bool = True) -> dict[str, int]:
    """Uniform: s_l = S for every layer; the paper keeps the first layer dense."""
    first = next(iter(shapes))
    counts = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        counts[name] = size if dense_first and name == first else size - n_zeros(sparsity, size)
    return counts


def er_counts(shapes: Shapes, sparsity: float, fixed: Mapping[str, float] | None = None) -> dict[str, int]:
    """Erdos-Renyi: density_l ~ (n_in + n_out) / (n_in * n_out); PyTorch shapes begin (out, in)."""
    raw = {name: (shape[0] + shape[1]) / (shape[0] * shape[1]) for name, shape in shapes.items()}
    return _share_budget(shapes, sparsity, raw, fixed or {})


def erk_counts(
    shapes: Shapes, sparsity: float, power: float = 1.0, fixed: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Erdos-Renyi-Kernel: density_l ~ (n_in + n_out + w + h) / (n_in * n_out * w * h)."""
    raw = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in shapes.items()}
    return _share_budget(shapes, sparsity, raw, fixed or {})


def _share_budget(
    shapes: Shapes, sparsity: float, raw: dict[str, float], fixed: Mapping[str, float]
) -> dict[str, int]:
    """Find eps with density_l = eps * raw_l and the total of uniform S; no density may exceed 1.

    `fixed` layers (name -> sparsity) stand outside the budget and are not compensated.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        ones_to_place, divisor = 0, 0.0
        for name in shapes:
            if name in fixed:
                continue
            if name in dense:
                ones_to_place -= n_zeros(sparsity, size[name])  # what it holds too much, the others give up
            else:
                ones_to_place += size[name] - n_zeros(sparsity, size[name])
                divisor += raw[name] * size[name]
        free = [name for name in shapes if name not in dense and name not in fixed]
        if not free:
            break
        eps = ones_to_place / divisor
        largest = max(raw[name] for name in free)
        if largest * eps <= 1:
            break
        dense |= {name for name in free if raw[name] == largest}  # equal maxima saturate together
    counts = {}
    for name in shapes:
        s = fixed[name] if name in fixed else 0.0 if name in dense else 1 - eps * raw[name]
        counts[name] = size[name] - n_zeros(s, size[name])
    return counts


# --- Section 3 (2), update schedule ---


def drop_fraction(t: int, end: int, alpha: float, decay: str = "cosine") -> float:
    """f_decay(t; alpha, T_end), cosine in the paper; the others are those of appendix G. t counts from 0."""
    return {
        "cosine": alpha / 2 * (1 + math.cos(math.pi * t / end)),
        "linear": alpha * (1 - t / end),
        "inverse_power": alpha * (1 - t / end) ** 3,
        "constant": alpha,
    }[decay]


def due(t: int, begin: int, every: int, end: int) -> bool:
    """Algorithm 1, "t mod dT == 0 and t < T_end", with the grid starting at `begin` (0 in the paper)."""
    return begin <= t < end and (t - begin) % every == 0


# --- Section 3 (3) and (4), drop and grow ---


def update_mask(weight: np.ndarray, mask: np.ndarray, grow_score: np.ndarray, n_drop: int) -> np.ndarray:
    """One topology update of one layer; of equal scores the lower flat index is kept, and grown, first."""
    w, active, score = weight.ravel().tolist(), mask.ravel().tolist(), grow_score.ravel().tolist()
    # I_active \ I_drop: all active connections but the n_drop of smallest |w|
    by_magnitude = sorted((-abs(w[i]), i) for i in range(len(w)) if active[i])
    kept = {i for _, i in by_magnitude[: len(by_magnitude) - n_drop]}
    # I_grow: the n_drop largest scores outside the kept set, so a connection dropped a moment ago may return
    by_score = sorted((-score[i], i) for i in range(len(w)) if i not in kept)
    grown = {i for _, i in by_score[:n_drop]}
    return np.array([i in kept or i in grown for i in range(len(w))]).reshape(mask.shape)


# --- Optimizers, with the semantics of torch.optim ---


@dataclass
class SGD:
    """SGD with momentum (dampening 0), optionally Nesterov; weight decay is added to the gradient."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def fresh_state(self, param: np.ndarray) -> Arrays:
        return {"momentum_buffer": np.zeros_like(param)}  # from 0 the first step gives buf = g, as in torch

    def step(self, param: np.ndarray, grad: np.ndarray, state: Arrays, steps: int) -> None:
        """`steps` counts optimizer steps from 1; SGD does not need it."""
        g = grad + self.weight_decay * param
        buf = state["momentum_buffer"]
        buf[...] = self.momentum * buf + g
        param -= self.lr * (g + self.momentum * buf if self.nesterov else buf)


@dataclass
class AdamW:
    """Adam with decoupled weight decay; eps stands outside the square root."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def fresh_state(self, param: np.ndarray) -> Arrays:
        return {"exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}

    def step(self, param: np.ndarray, grad: np.ndarray, state: Arrays, steps: int) -> None:
        """`steps` counts optimizer steps from 1."""
        (b1, b2), m, v = self.betas, state["exp_avg"], state["exp_avg_sq"]
        param *= 1 - self.lr * self.weight_decay
        m[...] = m + (1 - b1) * (grad - m)
        v[...] = b2 * v + (1 - b2) * grad * grad
        denominator = np.sqrt(v) / math.sqrt(1 - b2**steps) + self.eps
        param -= self.lr / (1 - b1**steps) * m / denominator


# --- A network small enough to differentiate by hand ---


class MLP:
    """Layers y = x W^T + b, tanh between them, loss = mean over all elements of (y - target)^2."""

    def __init__(self, weights: Arrays, biases: Arrays) -> None:
        self.weights, self.biases = weights, biases

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        """The input of every layer, and at last the output."""
        values = [x]
        for depth, name in enumerate(self.weights):
            z = values[-1] @ self.weights[name].T + self.biases[name]
            values.append(z if depth == len(self.weights) - 1 else np.tanh(z))
        return values

    def gradients(self, x: np.ndarray, target: np.ndarray) -> tuple[float, Arrays, Arrays]:
        """Loss, and its gradient for all weights (dense: also of inactive connections) and biases."""
        values = self.forward(x)
        error = values[-1] - target
        delta = 2 * error / error.size  # dL/dz of the last layer
        d_weights, d_biases = {}, {}
        for depth, name in reversed(list(enumerate(self.weights))):
            d_weights[name] = delta.T @ values[depth]
            d_biases[name] = delta.sum(axis=0)
            if depth > 0:  # values[depth] = tanh(z of the layer below), tanh' = 1 - tanh^2
                delta = (delta @ self.weights[name]) * (1 - values[depth] ** 2)
        return float(np.mean(error**2)), d_weights, d_biases


# --- Algorithm 1 ---


class Snapshot(NamedTuple):
    """Everything after iteration `step`, copied; `states[name]` is (state of weight, state of bias)."""

    step: int
    updated: bool
    loss: float
    weights: Arrays
    biases: Arrays
    masks: Arrays
    states: dict[str, tuple[Arrays, Arrays]]


def train(
    weights: Arrays,
    biases: Arrays,
    masks: Arrays,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    method: str = "rigl",
    optimizer: str = "sgd",
    hyper: Mapping[str, object],
    schedule: Mapping[str, object] | None = None,
    random_scores: Callable[[str, int, tuple[int, ...]], np.ndarray] | None = None,
) -> list[Snapshot]:
    """Algorithm 1 over one batch per iteration t = 0, 1, ...; the arguments are not changed.

    "rigl" grows by |dense gradient|, "set" by `random_scores(name, t, shape)`, "static" never updates.
    A layer without an entry in `masks` is dense. `schedule`: every, begin, end, alpha and decay.
    """
    assert method in ("rigl", "set", "static"), method
    rule = {"sgd": SGD, "adamw": AdamW}[optimizer](**hyper)
    masks = {name: mask.astype(bool) for name, mask in masks.items()}
    weights = {
        name: np.where(masks.get(name, True), w.astype(np.float64), 0.0) for name, w in weights.items()
    }
    biases = {name: b.astype(np.float64) for name, b in biases.items()}
    states = {name: (rule.fresh_state(weights[name]), rule.fresh_state(biases[name])) for name in weights}
    history, steps = [], 0
    for t, (x, target) in enumerate(batches):
        loss, d_weights, d_biases = MLP(weights, biases).gradients(x, target)
        updates = method != "static" and due(t, schedule["begin"], schedule["every"], schedule["end"])
        if updates:  # it takes the place of the optimizer step
            fraction = drop_fraction(t, schedule["end"], schedule["alpha"], schedule["decay"])
            for name, old in masks.items():
                score = np.abs(d_weights[name]) if method == "rigl" else random_scores(name, t, old.shape)
                new = update_mask(weights[name], old, score, n_drop=int(fraction * int(old.sum())))
                # Dropped and newly grown: weight and optimizer state are 0. A connection that was dropped and
                # grown again is in both masks and keeps both.
                for array in (weights[name], *states[name][0].values()):
                    array[new != old] = 0.0
                masks[name] = new
        else:
            steps += 1
            for name in weights:
                grad = np.where(masks.get(name, True), d_weights[name], 0.0)
                rule.step(weights[name], grad, states[name][0], steps)
                rule.step(biases[name], d_biases[name], states[name][1], steps)
        history.append(Snapshot(t, updates, loss, *copy.deepcopy((weights, biases, masks, states))))
    return history
