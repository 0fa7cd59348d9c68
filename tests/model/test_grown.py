"""What new connections are worth, and when an update is made: the choices beside the paper's defaults."""

import copy

import pytest
import torch
from torch import nn

from lightning_rigl import Growth, RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.model.sparse_init import rescale
from tests.callbacks.flops_problems import fit
from tests.callbacks.problems import Small, small
from tests.model.problems import batches, network

WEIGHT = torch.tensor([[1.0, -3.0, 0.0, 2.0], [0.0, 0.0, 4.0, -2.0]])
GRADIENT = torch.tensor([[0.5, 0.0, -2.0, 1.0], [4.0, -6.0, 0.0, 0.0]])
INITIAL = torch.arange(8.0).view(2, 4)
ACTIVE = torch.tensor([[True, True, True, True], [False, False, True, True]])  # one of them is worth 0


def values(growth, seed=0):
    return growth.new_values(WEIGHT, ACTIVE, INITIAL, GRADIENT, torch.Generator().manual_seed(seed))


def test_values_by_hand():
    assert values(Growth()).tolist() == [[0.0] * 4] * 2
    assert values(Growth("gradient", divisor=2)).tolist() == (GRADIENT / 2).tolist()
    assert values(Growth("sign", divisor=10)).tolist() == (GRADIENT.sign() / 10).tolist()
    shuffled = values(Growth("initial", divisor=4))
    assert sorted(shuffled.flatten().tolist()) == [n / 4 for n in range(8)]
    assert shuffled.flatten().tolist() != [n / 4 for n in range(8)]
    normal = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    deviation = (sum((w - 1 / 3) ** 2 for w in (1, -3, 0, 2, 4, -2)) / 6) ** 0.5
    torch.testing.assert_close(values(Growth("normal", divisor=3)), normal * deviation / 3)
    uniform = 2 * torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) - 1
    torch.testing.assert_close(values(Growth("uniform", divisor=3)), uniform * (12 / 6) / 3)


@pytest.mark.parametrize("kind", ["initial", "normal", "uniform"])
def test_random_values_follow_from_the_generator_alone(kind):
    before = torch.get_rng_state()
    assert torch.equal(values(Growth(kind)), values(Growth(kind)))
    assert not torch.equal(values(Growth(kind)), values(Growth(kind), seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_values_are_bounded_by_the_mean_magnitude():
    weight = torch.randn(100, 200, generator=torch.Generator().manual_seed(1))
    drawn = Growth("uniform").new_values(weight, weight != 0, None, None, torch.Generator().manual_seed(0))
    bound = weight.abs().mean()
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.99 * bound
    assert abs(drawn.mean()) < 0.01 * bound


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_random_values_do_not_shrink_with_the_density(kind):
    """New weights are of the size of those that are there, however many zeros are around them."""
    dense = torch.randn(100, 200, generator=torch.Generator().manual_seed(1))
    sizes = []
    for density in (1.0, 0.1, 0.01):
        mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(2)) < density
        drawn = Growth(kind).new_values(dense * mask, mask, None, None, torch.Generator().manual_seed(0))
        sizes.append(float(drawn.abs().mean()))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.2)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_random_values_of_a_layer_with_one_connection_or_none(kind):
    for active in (0, 1):
        mask = torch.arange(4) < active
        drawn = Growth(kind).new_values(3.0 * mask, mask, None, None, torch.Generator().manual_seed(0))
        assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divisor": "2"}, "growth, divisor: a number, got '2'"),
        ({"divisor": True}, "growth, divisor: a number, got True"),
        ({"momentum": "1"}, "growth, momentum: a number, got '1'"),
        ({"momentum": None}, "growth, momentum: a number, got None"),
        ({"regrown": "no"}, "growth, regrown: True or False, got 'no'"),
    ],
)
def test_other_types_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        Growth(**settings)


@pytest.mark.parametrize("growth", ["normal", Growth, {"values": "normal"}])
def test_what_is_no_growth_is_refused(growth):
    for make in (RigLCallback, lambda **settings: Sparsifier(network(), **settings)):
        with pytest.raises(
            TypeError, match=r"growth: expected a Growth, such as Growth\('normal'\), or None"
        ):
            make(growth=growth)


@pytest.mark.parametrize("how", ["foo", True, ["layer"]])
def test_an_unknown_rescale_is_refused_at_once(how):
    with pytest.raises(ValueError, match="rescale: one of layer, neuron, or None, got"):
        RigLCallback(rescale=how)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divisor": torch.inf}, "divisor: a number above 0, got inf"),
        ({"momentum": torch.inf}, "momentum: a number of at least 0, got inf"),
        ({"values": "ones"}, "unknown values 'ones'; the known ones are zeros, initial, normal"),
        ({"values": None}, "unknown values None"),
        ({"divisor": 0}, "divisor: a number above 0, got 0"),
        ({"momentum": -1}, "momentum: a number of at least 0, got -1"),
    ],
)
def test_bad_choices_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Growth(**settings)


def step(growth, method="rigl", optimizer=None, policy="skip_step", steps=3):
    """A network before and after its first update, at step 2."""
    model = network()
    schedule = UpdateSchedule(every=2, end=100, drop_fraction=0.5, policy=policy)
    sparsifier = Sparsifier(model, 0.7, method, schedule=schedule, growth=growth, seed=0)
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)))(model.parameters())
    sparsifier.start()
    for index, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        before = {name: layer.mask.clone() for name, layer in sparsifier.layers.items()}
        weights = {name: layer.parameter.detach().clone() for name, layer in sparsifier.layers.items()}
        grads = {name: layer.parameter.grad.clone() for name, layer in sparsifier.layers.items()}
        state = copy.deepcopy(optimizer.state_dict()["state"])
        updated = sparsifier.before_step(optimizer, index)
        optimizer.step()
        sparsifier.after_step()
    assert updated
    return sparsifier, optimizer, before, weights, grads, state


@pytest.mark.parametrize("kind", ["zeros", "gradient", "sign", "normal", "uniform", "initial"])
def test_a_grown_connection_has_its_value_and_all_others_keep_theirs(kind):
    """The known bug of other code: the value is computed, and lost."""
    sparsifier, _, before, weights, grads, _ = step(Growth(kind, divisor=5))
    for name, layer in sparsifier.layers.items():
        new, stayed = layer.mask & ~before[name], layer.mask & before[name]
        assert new.any()
        assert torch.equal(layer.parameter[stayed], weights[name][stayed])
        assert (layer.parameter[~layer.mask] == 0).all()
        if kind == "gradient":
            assert torch.equal(layer.parameter[new], grads[name][new] / 5)
        elif kind == "sign":
            assert (layer.parameter[new].abs() == 1 / 5).all()
        else:
            assert (layer.parameter[new] != 0).all() == (kind != "zeros")


def test_initial_values_are_those_before_masking_and_are_saved():
    sparsifier, *_ = step(Growth("initial"))
    dense = network()
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.notes["initial"], dense.get_parameter(name))
    again = Sparsifier(network(), 0.7, growth=Growth("initial"), seed=4)
    again.load_state_dict(sparsifier.state_dict())
    for name, layer in again.layers.items():
        assert torch.equal(layer.notes["initial"], sparsifier.layers[name].notes["initial"])


def test_what_is_dropped_and_grown_at_once_begins_anew_if_asked():
    for regrown in (False, True):
        growth = Growth("sign", divisor=7, regrown=regrown)
        sparsifier, optimizer, before, weights, grads, _ = step(growth)
        found = 0
        for name, layer in sparsifier.layers.items():
            count = int(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 100)).item()) / 2 * layer.count)
            order = weights[name].abs().masked_fill(~before[name], torch.inf).flatten().argsort()
            dropped = torch.zeros_like(before[name]).flatten()
            dropped[order[:count]] = True
            again = layer.mask & dropped.view_as(before[name])
            found += int(again.sum())
            expected = grads[name].sign() / 7 if regrown else weights[name]
            assert torch.equal(layer.parameter[again], expected[again])
            momentum = optimizer.state[layer.parameter]["momentum_buffer"][again]
            assert (momentum == 0).all() == (regrown or not len(momentum))
        assert found


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)]
)
def test_the_average_of_gradients_starts_at_a_multiple_of_the_dense_one(make):
    sparsifier, optimizer, before, _, grads, _ = step(Growth(momentum=2.0), optimizer=make)
    for name, layer in sparsifier.layers.items():
        new, state = layer.mask & ~before[name], optimizer.state[layer.parameter]
        average = state.get("momentum_buffer", state.get("exp_avg"))
        assert torch.equal(average[new], 2 * grads[name][new])
        assert "exp_avg_sq" not in state or (state["exp_avg_sq"][new] == 0).all()


def test_an_update_after_the_step_uses_its_gradient_and_leaves_the_step():
    """The step is made with the old mask, and then the masks change by the same gradient."""
    sparsifier, _, before, weights, grads, state = step(None, policy="after_step")
    for index, (name, layer) in enumerate(sparsifier.layers.items()):
        old = before[name]
        momentum = 0.9 * state[2 * index]["momentum_buffer"] + grads[name] * old
        stepped = (weights[name] - 0.1 * momentum) * old
        stayed = layer.mask & old
        torch.testing.assert_close(layer.parameter[stayed], stepped[stayed])
        count = int(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 100)).item()) / 2 * layer.count)
        kept = old.flatten().clone()
        kept[stepped.abs().masked_fill(~old, torch.inf).flatten().argsort()[:count]] = False
        score = grads[name].abs().masked_fill(kept.view_as(old), -1).flatten()
        kept[score.argsort(descending=True)[:count]] = True
        assert torch.equal(layer.mask, kept.view_as(old))
        assert (layer.parameter[~layer.mask] == 0).all()


def test_no_hook_stays_on_an_optimizer():
    _, optimizer, *_ = step(None, policy="after_step")
    assert not optimizer._optimizer_step_post_hooks


def test_a_drop_fraction_that_follows_the_learning_rate():
    class Decays(Small):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}
            ]

    schedule = UpdateSchedule(every=3, end=100, drop_fraction=0.4, decay="learning_rate")
    rigl = RigLCallback(0.8, schedule=schedule, seed=1)
    seen = []

    module = Decays()
    module.on_train_batch_end = lambda *args: seen.append(rigl.sparsifier.drop_fraction)
    with pytest.warns(UserWarning, match="training has"):
        fit(rigl, module=module, sizes=[8] * 10)
    assert seen == pytest.approx([0.0] * 3 + [0.4 / 2] * 3 + [0.4 / 8] * 3 + [0.4 / 16])


WARM_UPS = {
    "from a tenth": (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), 0.55),
    "from the half": (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=4), 0.75),
    "above its first rate": (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=12), 1.0),
}


@pytest.mark.parametrize("kind", WARM_UPS)
def test_in_a_warm_up_the_drop_fraction_is_as_small_as_the_rate_is(kind):
    """The share is that of ``initial_lr``, not of the rate of the first step, and 1 at most."""
    make, first = WARM_UPS[kind]
    model = network()
    schedule = UpdateSchedule(every=2, begin=2, end=9, drop_fraction=0.4, decay="learning_rate")
    sparsifier = Sparsifier(model, 0.5, schedule=schedule, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    warm_up = make(optimizer)
    sparsifier.start()
    seen = []
    for step, (x, y) in enumerate(batches(9)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if sparsifier.before_step(optimizer, step):
            seen.append(sparsifier.drop_fraction)
        optimizer.step()
        warm_up.step()
    assert seen == pytest.approx([0.4 * first, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("how", ["layer", "neuron"])
@pytest.mark.filterwarnings("ignore:RigLCallback. no topology update")
def test_initial_weights_are_rescaled_once(how, tmp_path):
    dense = {name: p.detach().clone() for name, p in small().named_parameters()}
    sparsifier = Sparsifier(module := small(), 0.8, rescale=how, seed=0)
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.parameter, rescale(dense[name], layer.mask, how))
    assert torch.equal(module.net[0].bias, dense["net.0.bias"])
    first = fit(RigLCallback(0.8, rescale=how, seed=0), module=(module := small()))
    first.save_checkpoint(tmp_path / "one.ckpt")
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}

    class Compare(RigLCallback):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.same = all(torch.equal(p, trained[name]) for name, p in pl_module.named_parameters())

    again = Compare(0.8, rescale=how, seed=0)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    key = next(iter(checkpoint["callbacks"]))
    checkpoint["callbacks"][again.state_key] = checkpoint["callbacks"].pop(key)
    torch.save(checkpoint, tmp_path / "two.ckpt")
    fit(again, module=small(), ckpt=tmp_path / "two.ckpt", max_epochs=2)
    assert again.same


def test_initial_values_are_not_made_up_in_a_run_that_has_not_kept_them():
    state = Sparsifier(network(), 0.5, seed=0).state_dict()
    sparsifier = Sparsifier(network(), 0.5, seed=1, growth=Growth("initial"))
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with pytest.raises(ValueError, match=r"growth='initial' .* has not kept them"):
        sparsifier.load_state_dict(state)
    assert all(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("how", ["layer", "neuron"])
def test_initial_values_are_rescaled_as_the_weights_are(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30))
    first = model[0].weight.detach().clone()
    sparsifier = Sparsifier(model, 0.8, seed=0, growth=Growth("initial"), rescale=how)
    mask, kept = sparsifier.masks["0.weight"], sparsifier.layers["0.weight"].notes["initial"]
    torch.testing.assert_close(kept[mask], model[0].weight.detach()[mask])
    fan_in = mask.sum(1, keepdim=True).clamp(min=1) / 40 if how == "neuron" else mask.sum() / mask.numel()
    torch.testing.assert_close(kept, first / fan_in.sqrt())


@pytest.mark.parametrize("method", ["gradual", "snip", "dnw", "gemminer"])
@pytest.mark.parametrize("make", [RigLCallback, lambda *args, **named: Sparsifier(network(), *args, **named)])
def test_weights_of_full_masks_are_not_to_be_rescaled(method, make):
    with pytest.raises(ValueError, match="rescale='layer' is for masks that leave connections out"):
        make(0.5, method, rescale="layer")
