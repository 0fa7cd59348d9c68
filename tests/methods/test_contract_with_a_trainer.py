"""What holds for every method of the package in a Trainer, over pairs of all that can be chosen beside it.

Any two choices meet in at least one row, but for those that do not go together.
"""

import itertools
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_rigl import FLOPsCallback, Growth, RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.methods.deepr import DeepR
from lightning_rigl.methods.gem_miner import GemMiner
from lightning_rigl.methods.grasp import GraSP
from tests.callbacks.problems import trainer
from tests.callbacks.stateful_loader import StatefulLoader, read, same
from tests.methods.test_contract import METHODS, NETWORKS, batches, check_counts
from tests.model.problems import OPTIMIZERS

CHOICES = {
    "method": list(METHODS),
    "network": list(NETWORKS),
    "optimizer": ["sgd-nesterov", "adamw", "adamw-fused"],
    "clip": [None, "norm", "value"],
    "growth": [Growth(), Growth("gradient", divisor=10), Growth("normal", regrown=True)],
    "window": [1, 2],  # batches of an optimizer step
    "precision": ["32-true", "bf16-mixed"],
    "automatic": [True, False],
    "policy": ["skip_step", "after_step"],
}
USES = {"mlp": (1, 1, 1), "cnn": (6, 4, 1), "transformer block": (5, 5, 5, 5, 1), "gru": (5, 5, 1)}
ATTENTION = 2 * (5 * 5 * 8 + 5 * 5 * 8)  # FLOPs without a weight: scores of word pairs, sums of values


def possible(row):
    """Whether these choices go together; some may not be made yet."""
    kind, growth = METHODS.get(row.get("method")), row.get("growth", Growth())
    if row.get("optimizer") == "adamw-fused" and row.get("precision") == "bf16-mixed" and row.get("clip"):
        return False  # Lightning does not clip what a fused optimizer may still have to unscale
    if kind is DeepR and row.get("policy") == "skip_step":
        return False  # what changes its sign is replaced after the step
    if kind is GraSP and row.get("automatic") is False:
        return False  # training_step returns no loss then
    if growth != Growth() and kind is not None and not kind().grows:
        return False  # there are no new connections
    return not (growth.reads_gradient and kind is not None and kind.gradient == "never")


def all_pairs(choices, possible):
    """Few rows, always the same, in which any two possible choices of different kinds meet.

    Greedy: a row begins with two that have not met, and goes on with what meets most others anew.
    """

    def told(cells):
        return {kind: choices[kind][i] for kind, i in cells}

    cells = [(kind, i) for kind, values in choices.items() for i in range(len(values))]
    apart = {tuple(sorted(pair)) for pair in itertools.combinations(cells, 2) if pair[0][0] != pair[1][0]}
    apart = dict.fromkeys(sorted(pair for pair in apart if possible(told(pair))))
    rows = []
    while apart:
        row = dict(next(iter(apart)))
        for kind in [kind for kind in choices if kind not in row]:
            new = {
                i: sum(tuple(sorted([(kind, i), cell])) in apart for cell in row.items())
                for i in range(len(choices[kind]))
                if possible(told([*row.items(), (kind, i)]))
            }
            row[kind] = max(new, key=lambda i: (new[i], (i + len(rows)) % len(new)))
        for pair in itertools.combinations(sorted(row.items()), 2):
            apart.pop(pair, None)
        rows.append({kind: choices[kind][row[kind]] for kind in choices})
    return rows


ROWS = all_pairs(CHOICES, possible)


def test_any_two_choices_meet():
    met = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for first, second in itertools.combinations(CHOICES, 2):
        for pair in itertools.product(CHOICES[first], CHOICES[second]):
            together = dict(zip((first, second), pair, strict=True))
            assert (tuple(together.items()) in met) == possible(together), together
    assert all(map(possible, ROWS))
    assert len(ROWS) == len(METHODS) * len(NETWORKS)  # fewer cannot be


class Module(pl.LightningModule):
    """A network of the contract, trained as the row says."""

    def __init__(self, row):
        super().__init__()
        torch.manual_seed(3)
        self.row, self.net = row, NETWORKS[row["network"]]()
        self.automatic_optimization = row["automatic"]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer, window = self.optimizers(), self.row["window"]
        self.manual_backward(loss / window)
        if (batch_idx + 1) % window == 0 or self.trainer.is_last_batch:
            self.clip_gradients(optimizer, *clipping(self.row))
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        return OPTIMIZERS[self.row["optimizer"]](list(self.parameters()))


def clipping(row):
    """Below the gradients of these networks, so that it has an effect."""
    return {None: None, "norm": 0.05, "value": 0.01}[row["clip"]], row["clip"]


class Loader(StatefulLoader):
    """Seven batches of an epoch: fourteen optimizer steps in two, or eight of a window of two batches."""

    def __init__(self):
        super().__init__()
        self.batches = batches(7)


class Watch(pl.Callback):
    """After each batch: counts, zeros, optimizer state; and FLOPs, as the masks tell them."""

    def __init__(self, row, rigl):
        self.row, self.rigl, self.kind = row, rigl, METHODS[row["method"]]
        self.flops, self.extra, self.flags = 0, 0, {}

    def on_train_start(self, trainer, module):
        layers = self.rigl.sparsifier.layers
        self.targets = {name: layer.target for name, layer in layers.items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.masks = {name: mask.clone() for name, mask in self.rigl.masks.items()}
        self.steps, self.updates = trainer.global_step, self.rigl.sparsifier.updates

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.add_flops(len(batch[0]), trainer.global_step > self.steps)
        for layer in self.rigl.sparsifier.layers.values():
            self.check(layer, trainer.optimizers[0].state.get(layer.parameter, {}))
        counts, before = self.rigl.sparsifier.counts, {k: int(mask.sum()) for k, mask in self.masks.items()}
        if self.kind is not GemMiner:  # its flags never come back, scores above a half may
            check_counts(self.row["method"], counts, self.targets, before)

    def add_flops(self, samples, stepped):
        """3 f_S, or 2 f_S + f_D of every batch of a window whose gradient is read everywhere."""
        masks, uses = self.masks.values(), USES[self.row["network"]]
        pairs = [(2 * n * int(mask.sum()), 2 * n * mask.numel()) for n, mask in zip(uses, masks, strict=True)]
        other = ATTENTION if self.row["network"] == "transformer block" else 0
        sparse, dense = (other + sum(costs) for costs in zip(*pairs, strict=True))
        self.flops += samples * 3 * sparse
        self.extra += samples * (dense - sparse)
        updated = self.rigl.sparsifier.updates > self.updates
        if stepped:
            if self.kind.gradient == "every_step" or (updated and self.kind.gradient == "at_updates"):
                self.flops += self.extra
            self.extra = 0

    def check(self, layer, state):
        active, grown = layer.mask, layer.mask & ~self.masks[layer.name]
        assert int(active.sum()) == layer.count
        assert (layer.parameter[~active] == 0).all()
        if "flag" in layer.notes:
            assert (active <= layer.notes["flag"]).all()
            assert (layer.notes["flag"] <= self.flags.get(layer.name, active | True)).all()
            self.flags[layer.name] = layer.notes["flag"].clone()
        if self.kind.latent:
            return
        for key, value in state.items():
            assert key == "step" or (value[~active | grown] == 0).all(), key
        values = self.row["growth"].values
        assert values == "gradient" or ((layer.parameter[grown] != 0) == (values == "normal")).all()

    def on_train_end(self, trainer, module):
        sparsifier = self.rigl.sparsifier
        if self.kind.starts_dense:
            assert sum(sparsifier.counts.values()) == sum(self.targets.values())
        sparsifier.check_zeros()
        assert not sparsifier.mixing
        assert (sparsifier.updates > 0) == (self.kind.schedule is not None)


def schedule(kind, policy="skip_step"):
    """Updates at steps 2, 4 and 6; of a method that begins at once, at once."""
    own = kind.schedule
    if own is None or own.every == 1:
        return own
    once = own.begin == 0 and own.policy == "skip_step"
    return UpdateSchedule(100 if once else 2, 0.3, begin=0 if own.begin == 0 else 2, end=7, policy=policy)


@cache
def left_by_a_dense_training(network):
    """The global generator's state; Lightning draws a number or two."""
    with torch.random.fork_rng(devices=[]):
        trainer(max_epochs=2).fit(Module({**ROWS[0], "network": network, "automatic": True}), Loader())
        return torch.get_rng_state()


def fit(row, folder, save=None, resume=None):
    """A training of two epochs and what it ends with, as a checkpoint holds it; ``save``: keep one then."""
    when = schedule(METHODS[row["method"]], row["policy"])
    rigl = RigLCallback(0.7, row["method"], schedule=when, growth=row["growth"], seed=3)
    watch, flops, keep = Watch(row, rigl), FLOPsCallback(), []
    if save:
        keep = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save, save_top_k=-1)]
    settings = {"max_epochs": 2, "precision": row["precision"], "enable_checkpointing": bool(keep)}
    if row["automatic"]:
        settings["accumulate_grad_batches"] = row["window"]
        settings |= dict(zip(("gradient_clip_val", "gradient_clip_algorithm"), clipping(row), strict=True))
    run, module = trainer(rigl, watch, flops, *keep, **settings), Module(row)
    run.fit(module, Loader(), ckpt_path=resume)
    assert torch.equal(torch.get_rng_state(), left_by_a_dense_training(row["network"]))
    assert resume or flops.report().train == watch.flops
    run.save_checkpoint(folder / "end.ckpt")
    return {**read(folder / "end.ckpt"), "flops": flops.report().train}


def named(row):
    return "-".join(map(str, {**row, "growth": row["growth"].values}.values()))


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_training(row, tmp_path):
    """What `Watch` asserts, and FLOPs by hand; then the same again, and resumed in the middle of an epoch."""
    save = (3, 5)[ROWS.index(row) % 2]  # after an update; of a window of two batches, an epoch has four steps
    first = fit(row, tmp_path, save)
    torch.rand(7)
    assert same(fit(row, tmp_path), first)
    assert same(fit(row, tmp_path, resume=tmp_path / f"step={save}.ckpt"), first)


def together(row):
    other = {**row, "automatic": not row["automatic"]}
    return row["clip"] and possible(other) and not METHODS[row["method"]].latent


@pytest.mark.parametrize("row", filter(together, ROWS), ids=named)
def test_clipping_by_the_trainer_and_by_hand_are_the_same(row, tmp_path):
    """The gradient is masked before, and what the method sees of it is not clipped."""
    first, second = (fit({**row, "automatic": automatic}, tmp_path) for automatic in (True, False))
    for each in (first, second):
        for clock in ("timetable", "steps", "limits"):
            del each["sparsity"][clock]
    assert same(first, second)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.latent])
def test_a_latent_method_is_trained_by_the_gradient_that_is_clipped_by_hand(name, tmp_path):
    row = {kind: values[0] for kind, values in CHOICES.items()}
    row |= {"method": name, "clip": "value", "automatic": False}
    module = Module(row)
    sparsifier = Sparsifier(module, 0.7, name, schedule=schedule(METHODS[name]), seed=3)
    optimizer = module.configure_optimizers()
    sparsifier.start(14)
    for step, (x, y) in enumerate(2 * batches(7)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        nn.utils.clip_grad_value_(module.parameters(), clipping(row)[0])
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    assert same(fit(row, tmp_path)["state_dict"], module.state_dict())


GROWS_BLINDLY = [name for name, kind in METHODS.items() if kind.gradient == "never" and kind().grows]


@pytest.mark.parametrize("growth", [Growth("gradient"), Growth("sign"), Growth(momentum=1.0)], ids=str)
@pytest.mark.parametrize("name", GROWS_BLINDLY)
def test_growth_by_a_gradient_that_a_method_never_reads_is_refused(name, growth):
    model = nn.Linear(8, 8)
    weight = model.weight.detach().clone()
    for make in (RigLCallback, lambda *settings, **more: Sparsifier(model, *settings, **more)):
        with pytest.raises(ValueError, match=rf"growth=Growth.* which {name} never does: take values"):
            make(0.5, name, growth=growth)
    assert torch.equal(model.weight, weight)


NEVER_GROW = ["static", "gradual", "gradualglobal", "snip", "snipglobal", "grasp", "synflow", "dnw"]
NEVER_GROW += ["edgepopup", "globaledgepopup", "gemminer"]


@pytest.mark.parametrize("growth", [Growth("normal"), Growth("gradient"), Growth(regrown=True)], ids=str)
@pytest.mark.parametrize("name", NEVER_GROW)
def test_growth_of_a_method_that_makes_no_new_connection_is_refused(name, growth):
    model = nn.Linear(8, 8)
    weight = model.weight.detach().clone()
    for make in (RigLCallback, lambda *settings, **more: Sparsifier(model, *settings, **more)):
        with pytest.raises(
            ValueError, match=r"(?i)growth=Growth.* and " + name + " never makes one: leave it"
        ):
            make(0.5, name, growth=growth)
        make(0.5, name, growth=Growth())
        model.weight.data.copy_(weight)


def test_which_methods_grow():
    assert {name.lower() for name, kind in METHODS.items() if not kind().grows} == set(NEVER_GROW)


def test_a_method_of_the_user_that_starts_dense_and_grows_says_so():
    class Both(GraSP):
        grows = True

    assert Sparsifier(nn.Linear(8, 8), 0.5, Both(), growth=Growth("normal")).growth.values == "normal"
