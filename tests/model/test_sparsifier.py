"""The contract of the engine: every method with every optimizer, in a plain loop."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rigl import ERK, Method, PerLayer, Sparsifier, Uniform, UpdateSchedule, load_masks
from lightning_rigl.kernels import library
from lightning_rigl.methods.base import Moment
from lightning_rigl.model.sparse_layer import private_generator
from tests.model.problems import MIXING, OPTIMIZERS, batches, network

SCHEDULE = UpdateSchedule(every=5, end=24, drop_fraction=0.5)


def train(model, optimizer, sparsifier, data, after=lambda step, updated: None):
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        updated = sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        after(step, updated)


def elementwise_state(optimizer, parameter):
    state = optimizer.state.get(parameter, {}).items()
    return {k: v for k, v in state if torch.is_tensor(v) and v.shape == parameter.shape and k != "step"}


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contract(name, method, device):
    """At every step: exact counts, zeros, fresh state where inactive, nothing rebound."""
    model = network(device=device)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    sparsifier = Sparsifier(model, 0.7, method, schedule=SCHEDULE, seed=0)
    sparsifier.start()
    counts = dict(sparsifier.counts)
    pointers = [t.data_ptr() for t in (*model.parameters(), *sparsifier.masks.values())]
    seen = []

    def check(step, updated):
        seen.append(updated)
        for key, parameter in sparsifier.parameters.items():
            mask = sparsifier.masks[key]
            assert int(mask.sum()) == counts[key]
            assert (parameter[~mask] == 0).all()
            for entry, value in elementwise_state(optimizer, parameter).items():
                inactive = value[~mask].cpu()
                assert (inactive == fresh(name, entry)).all(), entry

    train(model, optimizer, sparsifier, batches(30, device=device), check)
    assert [t.data_ptr() for t in (*model.parameters(), *sparsifier.masks.values())] == pointers
    assert sum(seen) == sparsifier.updates == (0 if method == "static" else 4)
    assert sparsifier.mixing == (name in MIXING)
    assert counts == sparsifier.counts


def fresh(name, entry):
    """What the state of a weight is that never had a gradient."""
    return {
        ("adagrad", "sum"): torch.tensor(0.1),
        ("rprop", "step_size"): torch.tensor(0.01),
        ("adamax", "exp_inf"): torch.tensor(1e-8),
    }.get((name, entry), torch.tensor(0.0))


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in MIXING])
def test_an_update_touches_only_what_it_changes(name, method, device):
    model = network(device=device)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    sparsifier = Sparsifier(
        model, 0.6, method, schedule=UpdateSchedule(every=10, end=100, drop_fraction=0.6), seed=0
    )
    sparsifier.start()
    train(model, optimizer, sparsifier, batches(10, device=device))
    before = copy.deepcopy((model.state_dict(), sparsifier.masks, optimizer.state_dict()["state"]))
    x, y = batches(1, device=device)[0]
    nn.functional.mse_loss(model(x), y).backward()
    assert sparsifier.before_step(optimizer, 10)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()  # changes nothing
    weights, masks, states = before
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        key = next((k for k, p in sparsifier.parameters.items() if p is parameter), None)
        stays = ~torch.zeros_like(parameter, dtype=torch.bool)
        if key is not None:
            stays = masks[key] == sparsifier.masks[key]
            grown, dropped = sparsifier.masks[key] & ~masks[key], masks[key] & ~sparsifier.masks[key]
            assert grown.sum() == dropped.sum() > 0
            assert (parameter[grown] == 0).all()
            assert (parameter[dropped] == 0).all()
        old = next(v for k, v in weights.items() if model.state_dict()[k].data_ptr() == parameter.data_ptr())
        assert torch.equal(parameter[stays], old[stays])
        for entry, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert torch.equal(value[stays], states[index][entry][stays])
                assert (value[~stays].cpu() == fresh(name, entry)).all()
            elif torch.is_tensor(value):  # step, and factored statistics
                assert torch.equal(value, states[index][entry])


def test_what_is_planted_at_an_inactive_connection_does_not_survive_growth():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :4] = True
    schedule = UpdateSchedule(every=1, end=9, decay="constant", drop_fraction=0.25)
    sparsifier = Sparsifier(model, schedule=schedule, init={"0.weight": mask})
    sparsifier.start()
    weight.grad = torch.zeros_like(weight)
    sparsifier.before_step(optimizer, 0)
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    weight.grad[3, 5] = 1.0  # the one to grow
    with torch.no_grad():
        weight[3, 5] = 7.0
        optimizer.state[weight]["momentum_buffer"][3, 5] = 7.0
    assert sparsifier.before_step(optimizer, 1)
    assert sparsifier.masks["0.weight"][3, 5]
    assert weight[3, 5] == 0
    assert optimizer.state[weight]["momentum_buffer"][3, 5] == 0


def test_dropped_and_regrown_keeps_value_and_state():
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    mask = torch.tensor([[True] * 4 + [False] * 4])
    schedule = UpdateSchedule(every=1, end=9, decay="constant", drop_fraction=0.25)
    sparsifier = Sparsifier(model, schedule=schedule, init={"0.weight": mask})
    sparsifier.start()
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5, -0.1, 0.3, -0.4, 0, 0, 0, 0]]))
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([[1.0, 2, 3, 4, 0, 0, 0, 0]])
    weight.grad = torch.tensor([[0.1, -0.9, 0.2, 0.3, 0.8, -0.5, 0.4, 0.6]])
    sparsifier.before_step(optimizer, 1)
    assert torch.equal(sparsifier.masks["0.weight"], mask)
    assert weight[0, 1] == -0.1
    assert optimizer.state[weight]["momentum_buffer"][0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_an_update_that_moves_nothing_still_takes_the_place_of_the_step():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    schedule = UpdateSchedule(every=5, end=20, drop_fraction=0.0)
    sparsifier = Sparsifier(model, 0.5, "set", schedule=schedule, seed=0)
    sparsifier.start()
    weights = []
    train(model, optimizer, sparsifier, batches(8), lambda *_: weights.append(model[0].bias.detach().clone()))
    assert torch.equal(weights[5], weights[4])
    assert not torch.equal(weights[6], weights[5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_postpones_the_update(poison):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, 0.7, schedule=SCHEDULE, seed=0)
    sparsifier.start()
    masks = {k: m.clone() for k, m in sparsifier.masks.items()}
    inactive = (~masks["2.weight"]).nonzero()[0]
    for step in range(5, 8):
        nn.functional.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
        if step < 7:
            model[2].weight.grad[tuple(inactive)] = poison
        updated = sparsifier.before_step(optimizer, step)
        assert updated == (step == 7)
        if not updated:
            assert model[2].weight.grad.isfinite().all()  # the poison was at an inactive connection
            assert all(torch.equal(masks[k], m) for k, m in sparsifier.masks.items())
        optimizer.zero_grad()
    assert sparsifier.postponed == 2
    assert all(p.isfinite().all() for p in model.parameters())


RUNS = st.floats(0.0, 0.97), st.sampled_from(["rigl", "set"]), st.integers(0, 2**62)


@settings(max_examples=15, deadline=None)
@given(*RUNS)
def test_counts_are_constant_over_two_hundred_updates(sparsity, method, seed):
    check_counts(sparsity, method, seed)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(*RUNS)
def test_counts_are_constant_over_two_hundred_updates_of_many_runs(sparsity, method, seed):
    check_counts(sparsity, method, seed)


def check_counts(sparsity, method, seed):
    model = nn.Sequential(nn.Linear(7, 11), nn.Conv1d(3, 5, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = UpdateSchedule(every=1, begin=0, end=400)
    try:
        sparsifier = Sparsifier(model, sparsity, method, schedule=schedule, seed=seed)
    except ValueError:
        assert sparsity > 1 - 2 / (77 + 45)
        return
    sparsifier.start()
    counts = dict(sparsifier.counts)
    generator = torch.Generator().manual_seed(seed % 1000)
    for step in range(200):
        for parameter in sparsifier.parameters.values():
            # few distinct values: ties everywhere
            parameter.grad = torch.randint(-1, 2, parameter.shape, generator=generator).float()
            with torch.no_grad():
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator)).mul_(
                    sparsifier.masks[next(k for k, p in sparsifier.parameters.items() if p is parameter)]
                )
        assert sparsifier.before_step(optimizer, step)
        assert {k: int(m.sum()) for k, m in sparsifier.masks.items()} == counts


def test_layers_of_equal_shape_have_masks_and_randomness_of_their_own():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    first, second = Sparsifier(model, 0.8, "set", seed=0).masks.values()
    assert not torch.equal(first, second)
    draws = [torch.rand(4, generator=private_generator(0, name, step)) for name in "ab" for step in (1, 2)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_half_gradients_are_scored_in_single_precision():
    seen = []

    class Product(Method):
        gradient = "at_updates"

        def drop_score(self, layer):
            return layer.weight.abs()

        def grow_score(self, layer):
            seen.append(layer.grad.dtype)
            return layer.grad.abs() * 1e-6  # below the smallest half

    model = nn.Linear(8, 8).half()
    sparsifier = Sparsifier(model, 0.5, Product(), schedule=SCHEDULE)
    sparsifier.start()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.weight.grad = torch.rand(8, 8).half() * 0.01
    sparsifier.before_step(optimizer, 5)
    assert seen == [torch.float32]


def test_large_but_finite_gradients_do_not_postpone():
    model = nn.Linear(40, 40)
    sparsifier = Sparsifier(model, 0.5, schedule=SCHEDULE)
    sparsifier.start()
    model.weight.grad = torch.full((40, 40), 1e37)  # their sum overflows
    assert sparsifier.before_step(torch.optim.SGD(model.parameters(), 0.1), 5)
    assert sparsifier.postponed == 0


def test_the_same_seed_gives_the_same_run_and_the_global_generator_is_not_used():
    def run(seed):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        state = torch.random.get_rng_state()
        sparsifier = Sparsifier(model, 0.8, "set", schedule=SCHEDULE, seed=seed)
        sparsifier.start()
        train(model, optimizer, sparsifier, batches(20))
        assert torch.equal(state, torch.random.get_rng_state())
        return torch.cat([m.view(-1) for m in sparsifier.masks.values()])

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(3)
    assert Sparsifier(network(), seed=None).seed == 1  # network() sets it


def test_saving_and_loading_continues_bitwise():
    data = batches(30)

    def make():
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        sparsifier = Sparsifier(model, 0.7, "set", schedule=SCHEDULE, seed=5)
        sparsifier.start()
        return model, optimizer, sparsifier

    straight = make()
    train(*straight, data)
    model, optimizer, sparsifier = make()
    train(model, optimizer, sparsifier, data[:12])
    saved = pickle.loads(pickle.dumps([part.state_dict() for part in (model, optimizer, sparsifier)]))
    model, optimizer, sparsifier = make()
    for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
        part.load_state_dict(state)
    for step, (x, y) in enumerate(data[12:], start=12):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
    for a, b in zip(straight[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(straight[2].masks[k], sparsifier.masks[k]) for k in sparsifier.masks)
    assert sparsifier.updates == straight[2].updates


class TestStart:
    """Where the first masks come from."""

    def test_magnitude_keeps_the_largest_weights(self):
        model = network()
        weight = model[0].weight.detach().clone()
        sparsifier = Sparsifier(model, 0.8, distribution=Uniform(dense_first=False), init="magnitude")
        kept = weight[sparsifier.masks["0.weight"]].abs()
        assert len(kept) == 39
        assert kept.min() >= weight[~sparsifier.masks["0.weight"]].abs().max()
        assert torch.equal(
            model[0].weight[sparsifier.masks["0.weight"]], weight[sparsifier.masks["0.weight"]]
        )

    def test_nonzero_takes_the_weights_as_they_are(self):
        model = network()
        with torch.no_grad():
            model[2].weight[:, ::2] = 0
        sparsifier = Sparsifier(model, init="nonzero")
        assert sparsifier.counts == {"0.weight": 192, "2.weight": 64, "4.weight": 32}

    def test_nonzero_on_dense_weights_is_refused(self):
        with pytest.raises(ValueError, match="they are dense"):
            Sparsifier(network(), init="nonzero")

    def test_masks_and_mask_files(self, tmp_path):
        first = Sparsifier(network(), 0.7, seed=1)
        torch.save(first.masks, tmp_path / "masks.pt")
        torch.save({"callbacks": {"RigLCallback": first.state_dict()}}, tmp_path / "run.ckpt")
        for init in (first.masks, str(tmp_path / "masks.pt"), str(tmp_path / "run.ckpt")):
            second = Sparsifier(network(), init=init, seed=2)
            assert all(torch.equal(first.masks[k], second.masks[k]) for k in first.masks)
            assert second.counts == first.counts

    def test_files_without_masks_are_refused(self, tmp_path):
        torch.save(network().state_dict(), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"holds no masks.*init='nonzero'"):
            load_masks(tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="no file"):
            load_masks(tmp_path / "nothing.pt")

    def test_files_that_are_something_else_are_refused(self, tmp_path):
        (tmp_path / "text").write_text("masks")
        with pytest.raises(ValueError, match="cannot be read"):
            load_masks(tmp_path / "text")
        for i, content in enumerate(
            ([1, 2], {1: 2}, torch.ones(3), {"callbacks": {"Other": {"masks": 3}}}, {})
        ):
            torch.save(content, tmp_path / f"{i}.pt")
            with pytest.raises(ValueError, match="holds no masks"):
                load_masks(tmp_path / f"{i}.pt")

    def test_a_path_object_is_a_path(self, tmp_path):
        first = Sparsifier(network(), 0.7, seed=1)
        torch.save(first.masks, tmp_path / "masks.pt")
        assert Sparsifier(network(), init=tmp_path / "masks.pt").counts == first.counts

    def test_a_dict_of_sparsities(self):
        sparsifier = Sparsifier(network(), {"^0": 0.5, "[02]": 0.75})
        assert sparsifier.counts == {"0.weight": 96, "2.weight": 32}
        assert (network()[4].weight != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": {"0": 1.5}}, r"\[0, 1\)"),
        ({"sparsity": {"layer9": 0.5}}, "'layer9' matches no layer"),
        ({"sparsity": {"0": 0.5}, "distribution": "uniform"}, "leave it out"),
        ({"sparsity": 0.9999}, "at most"),
        ({"method": "rigle"}, "did you mean 'rigl'"),
        ({"distribution": "erdos"}, "er, erk, .*uniform"),
        ({"pattern": "2:4"}, "unstructured"),
        ({"init": "randm"}, "'random', 'magnitude', 'nonzero'"),
        ({"sparsity": {}}, "names no layer"),
        ({"init": {}}, "empty"),
        ({"init": {"nope.weight": torch.ones(2, 2, dtype=torch.bool)}}, "no parameter 'nope.weight'"),
        ({"init": {"0.weight": torch.ones(2, 2, dtype=torch.bool)}}, r"\(2, 2\) in the masks and \(16, 12\)"),
        ({"init": {"0.weight": torch.ones(16, 12)}}, "bool"),
        ({"include": ["conv"]}, "near misses"),
        ({"include": "0.weight"}, "list of regular expressions"),
        ({"exclude": ["bias"]}, "matches no layer"),
        ({"exclude": ["weight"]}, "no parameter to make sparse"),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(arguments, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, **arguments)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("score", [None, torch.ones(3), 1.0])
def test_a_score_of_another_shape_is_refused(score):
    class Wrong(Method):
        def drop_score(self, layer):
            return layer.weight.abs()

        def grow_score(self, layer):
            return score

    model = network()
    sparsifier = Sparsifier(model, method=Wrong(), schedule=SCHEDULE)
    sparsifier.start()
    with pytest.raises(ValueError, match=r"Wrong: a score has the weight's shape \(16, 12\)"):
        sparsifier.update(torch.optim.SGD(model.parameters(), 0.1), Moment(5, 0.3))


def test_the_state_of_a_dense_training_is_reset_where_connections_are_inactive():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    nn.functional.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    optimizer.step()
    sparsifier = Sparsifier(model, 0.7, schedule=SCHEDULE)
    sparsifier.start()
    sparsifier.reset_state(optimizer)
    train(model, optimizer, sparsifier, batches(4))
    assert not sparsifier.mixing
    for name, parameter in sparsifier.parameters.items():
        assert (optimizer.state[parameter]["exp_avg"][~sparsifier.masks[name]] == 0).all()


def test_a_state_that_does_not_fit_is_refused():
    saved = Sparsifier(network(), 0.7).state_dict()
    with pytest.raises(ValueError, match=r"method RigL\(\), and this one has SET\(\)"):
        Sparsifier(network(), 0.7, "set").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"sparsity 0\.7, and this one has 0\.6"):
        Sparsifier(network(), 0.6).load_state_dict(saved)
    with pytest.raises(ValueError, match="format 99"):
        Sparsifier(network(), 0.7).load_state_dict({**saved, "version": 99})
    with pytest.raises(ValueError, match="do not fit the model"):
        Sparsifier(nn.Sequential(nn.Linear(3, 4)), 0.7).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"there are none for 0\.weight"):
        Sparsifier(network(), 0.7).load_state_dict(
            {**saved, "masks": {k: saved["masks"][k] for k in ["2.weight"]}}
        )
    with pytest.raises(ValueError, match=r"exclude \['\^0'\], and this one has \[\]"):
        Sparsifier(network(), 0.7).load_state_dict(Sparsifier(network(), 0.7, exclude=["^0"]).state_dict())


def test_an_update_before_start_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        Sparsifier(model).before_step(optimizer, 0)
    assert not Sparsifier(model, method="static").before_step(optimizer, 0)


@pytest.mark.parametrize("native", [False, True])
def test_an_ordinary_step_reads_nothing_back_and_allocates_nothing(native, monkeypatch):
    if native and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    monkeypatch.setattr(library, "loaded", library.load if native else lambda: None)

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, 0.9, schedule=SCHEDULE)
    sparsifier.start()
    train(model, optimizer, sparsifier, batches(1))
    nn.functional.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    with Watch() as watch:
        sparsifier.before_step(optimizer, 1)
        sparsifier.after_step()
    assert set(watch.seen) <= {"view", "detach", "bitwise_and_"}  # views, and one pass in place
    assert watch.seen.count("bitwise_and_") == (0 if native else len(sparsifier.masks))


def test_rows_of_the_summary_add_up():
    sparsifier = Sparsifier(network(), 0.7, distribution=ERK())
    table = sparsifier.summary()
    active = sum(int(row[2].split(" of ")[0]) for row in table.rows)
    assert f"{active} of 352" == table.total[2]
    assert "0.weight" in str(table)
    assert len(table.__rich__().columns) == 4


def test_given_layers_and_distributions_may_be_objects():
    sparsifier = Sparsifier(network(), 0.0, distribution=PerLayer({"2": 0.5}))
    assert sparsifier.counts == {"2.weight": 64}
