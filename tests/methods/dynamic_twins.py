"""Slow numpy twins of the methods that keep averages, move connections between layers or walk at random.

Written from the papers, in float64, with loops and sorted lists; nothing here may import the package. What is
drawn at random is handed in. The network and SGD are those of `tests.reference`.

SNFS: Dettmers and Zettlemoyer, arXiv:1907.04840. RigL-SG and RigL-SM: arXiv:2103.15767. DSR: Mostafa and
Wang, arXiv:1902.05967. DEEP R: Bellec et al., arXiv:1711.05136, algorithm 1.
"""

import copy
import math
from fractions import Fraction

import numpy as np

from tests.reference import MLP, SGD, drop_fraction, due


def shares(total, weights):
    """`total` things by weight: whole parts first, then one each to the largest remainders."""
    weights = [Fraction(float(w)) for w in weights]
    if sum(weights) == 0:
        weights = [Fraction(1) for _ in weights]
    exact = [total * w / sum(weights) for w in weights]
    given = [int(e) for e in exact]
    while sum(given) < total:
        given[max(range(len(exact)), key=lambda i: (exact[i] - given[i], -i))] += 1
    return given


def hand_out(total, weights, room, evenly):
    """The same, but no layer gets more than its room; what is left goes round again."""
    given = [0 for _ in room]
    while sum(given) < total:
        left = total - sum(given)
        open_layers = [i for i in range(len(room)) if given[i] < room[i]]
        for i, n in zip(open_layers, shares(left, [weights[i] for i in open_layers]), strict=True):
            given[i] = min(given[i] + n, room[i])
        if evenly:
            weights = [1 for _ in room]
    return given


def snfs_counts(masks, importance, rate):
    """Layer name -> (dropped, grown) of SNFS with redistribution."""
    names, dropped = list(masks), {}
    for name in names:
        size, active = masks[name].size, int(masks[name].sum())
        sparsity, share = 1 - active / size, importance[name] / (sum(importance.values()) or 1)
        own = min(sparsity, rate) if sparsity < 0.2 and share > 1 / len(names) else rate
        dropped[name] = min(math.ceil(own * active), active - 1)
    places = [int((~masks[n]).sum()) + dropped[n] for n in names]
    room = [math.floor(Fraction(99, 100) * p) for p in places]
    total, weights = sum(dropped.values()), [importance[n] for n in names]
    given = hand_out(min(total, sum(room)), weights, room, evenly=True)
    rest = [p - r for p, r in zip(places, room, strict=True)]
    more = hand_out(total - sum(given), weights, rest, evenly=True)
    return {n: (dropped[n], a + b) for n, a, b in zip(names, given, more, strict=True)}


def dsr_counts(weights, masks, threshold):
    """Layer name -> (dropped, grown) of DSR."""
    names = list(masks)
    active = {n: int(masks[n].sum()) for n in names}
    small = {
        n: sum(
            1 for w, m in zip(weights[n].ravel(), masks[n].ravel(), strict=True) if m and abs(w) < threshold
        )
        for n in names
    }
    dropped = {n: small[n] if small[n] < active[n] else active[n] - 1 for n in names}
    left = [active[n] - dropped[n] for n in names]
    free = [masks[n].size - active[n] for n in names]
    total = sum(dropped.values())
    given = hand_out(min(total, sum(free)), left, free, evenly=False)
    more = hand_out(total - sum(given), left, [dropped[n] for n in names], evenly=False)
    return {n: (dropped[n], a + b) for n, a, b in zip(names, given, more, strict=True)}


def new_mask(keep_score, grow_score, mask, dropped, grown):
    """Drop the lowest of the active, grow the highest of the rest; of equals the lower index first."""
    keep, score, active = keep_score.ravel().tolist(), grow_score.ravel().tolist(), mask.ravel().tolist()
    order = sorted((-keep[i], i) for i in range(len(keep)) if active[i])
    kept = {i for _, i in order[: len(order) - dropped]}
    order = sorted((-score[i], i) for i in range(len(keep)) if i not in kept)
    new = kept | {i for _, i in order[:grown]}
    return np.array([i in new for i in range(len(keep))]).reshape(mask.shape)


class Twin:
    """One training run. `draw(kind, name, step, shape)`: random numbers; kind is grow, sign or noise."""

    def __init__(self, method, weights, biases, masks, lr, schedule, draw, **own):
        self.method, self.schedule, self.draw, self.own = method, schedule, draw, own
        self.masks = {n: m.astype(bool) for n, m in masks.items()}
        self.weights = {n: np.where(masks[n], w, 0.0) for n, w in weights.items()}
        self.biases = {n: b.copy() for n, b in biases.items()}
        self.lr, self.rule = lr, SGD(lr, momentum=0.9)
        self.states = {
            n: (self.rule.fresh_state(self.weights[n]), self.rule.fresh_state(self.biases[n]))
            for n in weights
        }
        self.momentum = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.threshold = own.get("threshold")
        self.sign = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.marked = {}

    def step(self, t, x, target):
        """Iteration t; returns whether it updated the topology."""
        _, gradients, d_biases = MLP(self.weights, self.biases).gradients(x, target)
        self.before(t, gradients)
        s = self.schedule
        updates = due(t, s["begin"], s["every"], s["end"])
        if updates and s["policy"] == "skip_step":
            self.update(t, gradients)
            return True
        for n in self.weights:
            self.rule.step(
                self.weights[n], np.where(self.masks[n], gradients[n], 0.0), self.states[n][0], t + 1
            )
            self.rule.step(self.biases[n], d_biases[n], self.states[n][1], t + 1)
        if self.method == "deepr":
            self.walk(t)
        if updates:
            self.update(t, gradients)
        return updates

    def before(self, t, gradients):
        """Averages of gradients, and signs."""
        beta = self.own.get("momentum", 0.0)
        for n, g in gradients.items():
            if self.method in ("snfs", "snfsoriginal"):
                self.momentum[n] = beta * self.momentum[n] + (1 - beta) * g
            if self.method == "riglsm":  # nothing is known of what is not active
                old = np.where(self.masks[n], self.momentum[n], 0.0)
                self.momentum[n] = beta * old + (1 - beta) * np.where(self.masks[n], g, 0.0)
            if self.method == "deepr":
                coin = self.draw("sign", n, t, g.shape)
                for i in np.ndindex(g.shape):
                    if not self.masks[n][i]:
                        self.sign[n][i] = 0
                    elif self.sign[n][i] == 0 and self.weights[n][i] != 0:
                        self.sign[n][i] = 1 if self.weights[n][i] > 0 else -1
                    elif self.sign[n][i] == 0:
                        self.sign[n][i] = 1 if coin[i] < 0.5 else -1

    def walk(self, t):
        """Algorithm 1 for theta = s w: L1, noise; below 0 a connection is dormant."""
        for n, w in self.weights.items():
            noise = self.draw("noise", n, t, w.shape)
            for i in np.ndindex(w.shape):
                if self.masks[n][i]:
                    theta = self.sign[n][i] * w[i] - self.lr * self.own["l1"]
                    theta += self.sign[n][i] * math.sqrt(2 * self.lr * self.own["temperature"]) * noise[i]
                    w[i] = self.sign[n][i] * theta if theta >= 0 else 0.0
                    if theta < 0:
                        self.sign[n][i] = 0

    def update(self, t, gradients):
        s = self.schedule
        rate = drop_fraction(t, s["end"], s["alpha"], s["decay"])
        counts = self.counts(gradients, rate)
        for n, mask in self.masks.items():
            if counts[n] == (0, 0):
                continue
            keep = np.abs(self.sign[n]) if self.method == "deepr" else np.abs(self.weights[n])
            new = new_mask(keep, self.growth(n, t, gradients[n]), mask, *counts[n])
            for array in (self.weights[n], *self.states[n][0].values()):
                array[new != mask] = 0.0
            self.masks[n] = new

    def counts(self, gradients, rate):
        def mean_active(values):
            return {n: float(np.abs(values[n][m]).mean()) for n, m in self.masks.items()}

        if self.method in ("snfsoriginal", "riglsm"):
            return snfs_counts(self.masks, mean_active(self.momentum), rate)
        if self.method == "riglsg":
            return snfs_counts(self.masks, mean_active(gradients), rate)
        if self.method == "dsr":
            counts = dsr_counts(self.weights, self.masks, self.threshold)
            total, wanted = (
                sum(d for d, _ in counts.values()),
                rate * sum(int(m.sum()) for m in self.masks.values()),
            )
            self.threshold *= 0.5 if total > 1.1 * wanted else 2 if total < 0.9 * wanted else 1
            return counts
        if self.method == "deepr":
            lost = {n: int((self.sign[n][m] == 0).sum()) for n, m in self.masks.items()}
            return {n: (0, 0) if self.masks[n].all() else (k, k) for n, k in lost.items()}
        return {n: (0, 0) if m.all() else (int(rate * m.sum()),) * 2 for n, m in self.masks.items()}

    def growth(self, n, t, gradient):
        if self.method in ("snfs", "snfsoriginal"):
            return np.abs(self.momentum[n])
        if self.method in ("riglsg", "riglsm"):
            return np.abs(gradient)
        if self.method == "riglinverted":
            return -np.abs(gradient)
        random = self.draw("grow", n, t, gradient.shape)
        return np.where(self.masks[n], random - 1, random) if self.method == "dsr" else random

    def snapshot(self):
        return copy.deepcopy((self.weights, self.masks))
