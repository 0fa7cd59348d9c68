"""CigL: a random mask over the active weights in each training step; topology by RigL.

    weight    1   2   3   4   0   0
    factors   1   0   1   1   1   1      connection 1 is left out; where there is none the factor is 1

A step is W <- W - rate Z dL/dw(Z W): connection 1 keeps its value, the others get the gradient at Z W.
"""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from lightning_rigl import Connections, RigLCallback, Sparsifier, UpdateSchedule, load_masks
from lightning_rigl.methods.base import Method
from lightning_rigl.methods.cigl import CigL
from lightning_rigl.model.sparse_layer import private_generator
from tests import reference
from tests.callbacks.problems import Small, data, small, trainer
from tests.callbacks.stateful_loader import adamw, run, same
from tests.model.problems import batches, network

SCHEDULE = UpdateSchedule(every=3, end=33, drop_fraction=0.5)


def layer(seed=0, size=6):
    weight = torch.zeros(size)
    weight[: size * 2 // 3] = torch.arange(1.0, size * 2 // 3 + 1)
    return Connections(weight, weight != 0, None, torch.Generator().manual_seed(seed))


class TestFactors:
    def test_only_active_connections_are_left_out(self):
        factors = CigL(drop=0.5).disturb(layer(size=9000))
        assert set(factors[:6000].tolist()) == {0.0, 1.0}
        assert set(factors[6000:].tolist()) == {1.0}
        assert float((factors[:6000] == 0).float().mean()) == pytest.approx(0.5, abs=0.03)

    @pytest.mark.parametrize("drop", [0.0, 0.1, 0.9])
    def test_with_the_given_probability(self, drop):
        factors = CigL(drop).disturb(layer(size=30000))[:20000]
        assert float((factors == 0).float().mean()) == pytest.approx(drop, abs=0.01)

    def test_scaled_the_mean_stays(self):
        factors = CigL(0.2, scaled=True).disturb(layer(size=30000))
        assert factors[:20000].unique().tolist() == [0.0, 1.25]
        assert float(factors[:20000].mean()) == pytest.approx(1, abs=0.01)
        assert set(factors[20000:].tolist()) == {1.0}

    def test_by_the_layers_generator_alone(self):
        state = torch.random.get_rng_state()
        first, second, other = (CigL(0.5).disturb(layer(seed, 90)) for seed in (0, 0, 1))
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("drop", [-0.1, 1, 1.5, float("nan")])
    def test_a_probability_out_of_range_is_refused(self, drop):
        with pytest.raises(ValueError, match=r"cigl, drop: a probability in \[0, 1\)"):
            CigL(drop)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"drop": "a"}, "cigl, drop: a number, got 'a'"),
            ({"drop": None}, "cigl, drop: a number, got None"),
            ({"drop": False}, "cigl, drop: a number, got False"),
            ({"scaled": "yes"}, "cigl, scaled: True or False, got 'yes'"),
        ],
    )
    def test_other_types_are_refused(self, settings, message):
        with pytest.raises(TypeError, match=message):
            CigL(**settings)


def test_what_is_left_out_at_an_update_does_not_grow_again_in_it():
    """Connection 0 is the smallest, with by far the largest gradient; it comes back only if it took part."""
    seen = {False: 0, True: 0}
    for seed in range(12):
        model = nn.Linear(4, 1, bias=False).double()
        model.weight.data = torch.tensor([[1e-3, 2.0, 0.0, 0.0]], dtype=torch.float64)
        schedule = UpdateSchedule(every=1, begin=0, end=1, drop_fraction=0.5, decay="constant")
        sparsifier = Sparsifier(model, 0.5, CigL(0.5), schedule=schedule, init="nonzero", seed=seed)
        sparsifier.start(1)
        sparsifier.before_forward(0)
        left_out = bool(model.weight[0, 0] == 0)
        model(torch.tensor([[100.0, 1.0, 1.0, 2.0]], dtype=torch.float64)).sum().backward()
        sparsifier.before_step(torch.optim.SGD(model.parameters(), 0.1), 0)
        assert sparsifier.masks["weight"].int().tolist() == [[0, 1, 0, 1] if left_out else [1, 1, 0, 0]]
        seen[left_out] += 1
    assert all(seen.values())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_fifty_steps_equal_a_slow_twin(scaled, weight_decay):
    """SGD by hand in numpy: gradient at Z W, times Z; RigL's update with the gradient of such a step."""
    model = network(torch.float64)
    schedule = UpdateSchedule(every=12, end=40, drop_fraction=0.4)
    sparsifier = Sparsifier(model, 0.6, CigL(0.3, scaled), schedule=schedule, seed=7)
    sparsifier.start(total_steps=50)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, weight_decay=weight_decay)
    own = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    masks = {name: mask.numpy().copy() for name, mask in sparsifier.masks.items()}

    for step, (x, y) in enumerate(batches(50, torch.float64)):
        sparsifier.before_forward(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()

        z = {}
        for name, mask in masks.items():
            u = torch.rand(mask.shape, generator=private_generator(7, name, step)).numpy()
            z[name] = 1.0 * ~(mask & (u < 0.3))
            z[name][mask] *= 1 / 0.7 if scaled else 1
        biases = {name: own[name.replace("weight", "bias")] for name in masks}
        _, grads, slopes = reference.MLP({n: own[n] * z[n] for n in masks}, biases).gradients(
            x.numpy(), y.numpy()
        )
        due = reference.due(step, 12, 12, 40)
        for name, mask in masks.items():
            grad = grads[name] * z[name]
            if due:
                dropped = int(reference.drop_fraction(step, 40, 0.4) * int(mask.sum()))
                masks[name] = reference.update_mask(own[name], mask, abs(grad), dropped)
                own[name][masks[name] != mask] = 0
            else:
                own[name] -= 0.2 * (grad * mask + weight_decay * own[name])
                biases[name] -= 0.2 * (slopes[name] + weight_decay * biases[name])
        for name, mask in masks.items():
            assert (sparsifier.masks[name].numpy() == mask).all()
            torch.testing.assert_close(
                sparsifier.parameters[name].detach(), torch.from_numpy(own[name]), rtol=0, atol=1e-12
            )
    assert sparsifier.updates == 3


class Watched(Small):
    """Remembers the weights that each kind of step sees."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seen = {"train": [], "validate": []}

    def note(self, kind):
        weights = {n: p.detach().clone() for n, p in self.named_parameters() if p.ndim > 1}
        self.seen[kind].append((self.trainer.global_step, weights))

    def training_step(self, batch, batch_idx):
        self.note("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("validate")
        super().validation_step(batch, batch_idx)


class AtRest(pl.Callback):
    """Steps done -> the weights after the optimizer's step, by a hook on the optimizer itself."""

    def __init__(self):
        self.weights = {}

    def on_train_start(self, trainer, module):
        matrices = {n: p for n, p in module.named_parameters() if p.ndim > 1}

        def keep(*_):
            self.weights[len(self.weights)] = {n: p.detach().clone() for n, p in matrices.items()}

        keep()
        trainer.optimizers[0].register_step_post_hook(keep)


def cigl(**settings):
    return RigLCallback(**{"sparsity": 0.5, "method": CigL(0.3), "schedule": SCHEDULE, "seed": 3, **settings})


MODES = {
    "each epoch": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "inside an epoch": {"val_check_interval": 3},
    "inside an accumulation": {"val_check_interval": 3, "accumulate_grad_batches": 2},
    "accumulated by three": {"val_check_interval": 1, "accumulate_grad_batches": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_training_sees_disturbed_weights_and_validation_never(mode, tmp_path):
    torch.manual_seed(0)
    module, rigl, rest = Watched(), cigl(), AtRest()
    loop = trainer(rigl, rest, **MODES[mode])
    loop.fit(module, data(), data())
    validations = [(step, weights) for step, weights in module.seen["validate"] if step > 0]
    assert len(validations) >= 5
    for step, weights in validations:
        assert same(weights, rest.weights[step])
    accumulated = {}
    for step, weights in module.seen["train"]:
        left_out = {n: (w == 0) & (rest.weights[step][n] != 0) for n, w in weights.items()}
        share = sum(int(x.sum()) for x in left_out.values()) / sum(
            int((w != 0).sum()) for w in rest.weights[step].values()
        )
        assert 0.1 < share < 0.5
        assert same(left_out, accumulated.setdefault(step, left_out)), "batches of one step share their Z"
        kept = {n: torch.where(out, rest.weights[step][n], weights[n]) for n, out in left_out.items()}
        assert same(kept, rest.weights[step])
    assert len({tuple(x["net.0.weight"].view(-1).tolist()) for x in accumulated.values()}) == len(accumulated)


@pytest.mark.parametrize("rigl_first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_checkpoints_hold_undisturbed_weights(accumulate, rigl_first, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    rest, rigl = AtRest(), cigl()
    callbacks = [rigl, rest, keep] if rigl_first else [keep, rest, rigl]
    loop = trainer(*callbacks, enable_checkpointing=True, accumulate_grad_batches=accumulate)
    loop.fit(small(), data())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 40 // accumulate
    for file in files:
        saved, masks = torch.load(file, weights_only=True), load_masks(file)
        for name, weight in rest.weights[saved["global_step"]].items():
            assert torch.equal(saved["state_dict"][name], weight)
            assert (weight[~masks[name]] == 0).all()


@pytest.mark.parametrize("step", [2, 3, 4, 7])
def test_a_resumed_fit_ends_bitwise_as_the_straight_one(step, tmp_path):
    def sparse(seed):
        return cigl(schedule=UpdateSchedule(every=3, end=12, drop_fraction=0.5), seed=seed)

    straight, module = run(tmp_path, sparse(4)), small(seed=1, optimizer=adamw)
    again = run(tmp_path / "again", sparse(9), module=module, resume=tmp_path / f"step={step}.ckpt")
    assert straight["sparsity"]["updates"] == 3
    assert same(straight, again)


def test_drop_zero_is_rigl(tmp_path):
    plain = run(tmp_path / "rigl", cigl(method="rigl"))
    none = run(tmp_path / "cigl", cigl(method=CigL(0.0)))
    assert same(plain["state_dict"], none["state_dict"])
    assert Method.of("cigl") == CigL(drop=0.1, scaled=False)


class Calibrated(Small):
    """Measures the expected calibration error over ten bins, and notes the weights that it is of."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.calibration = MulticlassCalibrationError(num_classes=4, n_bins=10, norm="l1")

    def test_step(self, batch, batch_idx):
        self.calibration(self(batch[0]).softmax(1), batch[1])
        self.log("ece", self.calibration)


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=0.6, annealing_epochs=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=20),
}


class Last(pl.Callback):
    """The weights of the last step, before an average takes their place."""

    def on_train_epoch_end(self, trainer, module):
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("average", AVERAGES)
def test_the_late_average_has_the_zeros_and_its_calibration_is_measured(average):
    """The recipe of the documentation."""
    torch.manual_seed(0)
    module, rigl, last = Calibrated(), cigl(), Last()
    loop = trainer(rigl, last, AVERAGES[average](), max_epochs=6)
    loop.fit(module, data())
    for name, mask in rigl.masks.items():
        weight = module.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert int((weight != 0).sum()) == int(mask.sum())
        assert not torch.equal(weight, last.weights[name]), "this is the average"
    measured = loop.test(module, data(), verbose=False)[0]["ece"]
    assert measured == pytest.approx(calibration_error(module, data()), abs=1e-6)
    assert 0 < measured < 1


def calibration_error(module, loader):
    """Sum over bins of their share times |accuracy - confidence|, in loops."""
    bins = [[] for _ in range(10)]
    with torch.no_grad():
        for x, y in loader:
            for row, label in zip(module(x).softmax(1), y, strict=True):
                confidence, guess = row.max(0)
                bins[min(int(confidence * 10), 9)].append((float(confidence), float(guess == label)))
    total = sum(map(len, bins))
    return sum(
        len(b) / total * abs(sum(right for _, right in b) / len(b) - sum(c for c, _ in b) / len(b))
        for b in bins
        if b
    )


def test_the_statistics_that_averaging_collects_are_those_of_the_average():
    """SWA adds an epoch in which BatchNorm sees the averaged weights: nothing is disturbed there."""
    module = small()
    module.net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 4))
    average = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    trainer(cigl(), average, max_epochs=5).fit(module, data(batch_size=64))
    with torch.no_grad():
        hidden = module.net[0](torch.cat([x for x, _ in data()]))
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(module.net[1].running_var, hidden.var(0))


def test_a_loop_that_disturbs_nothing_is_refused():
    model = network()
    sparsifier = Sparsifier(model, 0.5, "cigl")
    sparsifier.start(10)
    x, y = batches(1)[0]
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"CigL disturbs .* call sparsifier.before_forward\(step\) before"):
        sparsifier.before_step(torch.optim.SGD(model.parameters(), 0.1), 0)
