"""A plain training loop for latent methods, and their slow twin: plain torch, sorted lists, no package."""

import copy

import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_rigl import Sparsifier
from lightning_rigl.model.mask_files import unpack_masks
from tests.model.problems import batches, network

HYPER = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3}


def groups(parameters, hyper):
    """Scores and biases need other rates: a rate of scores in [0, 1] is far too high for biases."""
    kinds = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    return torch.optim.SGD([{"params": kinds[0], **hyper}, {"params": kinds[1], "lr": 0.05}])


class Loop:
    """A sparsifier, its model and its optimizer; `go` trains to a step."""

    def __init__(self, method, sparsity=0.7, schedule=None, dtype=torch.float64, hyper=HYPER, **settings):
        self.model, self.sparsity = network(dtype), sparsity
        self.initial = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.sparsifier = Sparsifier(self.model, sparsity, method, schedule=schedule, seed=5, **settings)
        self.optimizer = groups(list(self.model.parameters()), hyper)
        self.data = batches(60, dtype)
        self.sparsifier.start(len(self.data))
        self.step = 0

    def go(self, until, after=lambda loop: None):
        for step in range(self.step, until):
            self.step, (x, y) = step, self.data[step]
            self.optimizer.zero_grad()
            mse_loss(self.model(x), y).backward()
            self.sparsifier.before_step(self.optimizer, step)
            self.optimizer.step()
            self.sparsifier.after_step()
            after(self)
        self.step = until
        return self

    def notes(self, key):
        return {name: layer.notes[key].clone() for name, layer in self.sparsifier.layers.items()}

    def state(self):
        parts = self.model.state_dict(), self.optimizer.state_dict(), self.sparsifier.state_dict()
        return copy.deepcopy(parts)

    def load(self, state):
        """As a new process does: weights first, then masks and what goes with them."""
        model, optimizer, own = copy.deepcopy(state)
        self.model.load_state_dict(model)
        method, schedule = self.sparsifier.method, self.sparsifier.schedule
        masks = unpack_masks(own["masks"])
        self.sparsifier = Sparsifier(
            self.model, self.sparsity, method, schedule=schedule, init=masks, seed=99
        )
        self.sparsifier.load_state_dict(own)
        self.optimizer.load_state_dict(optimizer)
        return self


class Twin:
    """The network with weights w x mask(score), scores trained by torch's own SGD, straight through."""

    def __init__(self, loop, choose, through, penalty=None, hyper=HYPER):
        self.names = list(loop.sparsifier.masks)
        self.weights = {name: loop.initial[name] for name in self.names}
        self.scores = {n: nn.Parameter(v) for n, v in loop.notes("variable").items()}
        biases = {n: v for n, v in loop.initial.items() if n not in self.weights}
        self.biases = {n: nn.Parameter(v.clone()) for n, v in biases.items()}
        self.choose, self.through, self.penalty = choose, through, penalty
        own = {n: self.scores.get(n, self.biases.get(n)) for n in loop.initial}
        self.optimizer = groups(list(own.values()), hyper)
        self.masks = choose(self.scores)

    def effective(self):
        weights = {}
        for name, w in self.weights.items():
            s = self.through(self.scores[name])
            weights[name] = w * (self.masks[name] + s - s.detach())
        return weights

    def train(self, x, y, after=lambda: None):
        weights = self.effective()
        for depth, name in enumerate(self.names):
            x = nn.functional.linear(x, weights[name], self.biases[name.replace("weight", "bias")])
            x = x.tanh() if depth < len(self.names) - 1 else x
        loss = mse_loss(x, y)
        if self.penalty:
            loss = loss + self.penalty(self.scores)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            after()
        self.masks = self.choose(self.scores)


def highest(scores, counts):
    """Bool per layer: of each group of layers its count of highest scores, of equal ones the first."""
    masks = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
    for names, count in counts:
        ranked = sorted(
            (-value, place, index, name)
            for place, name in enumerate(names)
            for index, value in enumerate(scores[name].detach().reshape(-1).tolist())
        )
        for _, _, index, name in ranked[:count]:
            masks[name].view(-1)[index] = True
    return masks
