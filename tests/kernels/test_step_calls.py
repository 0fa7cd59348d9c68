"""Native steps change active connections as torch's dense steps do, and nothing else."""

import numpy as np
import pytest
import torch

from lightning_rigl.kernels import step_calls, topology_calls

SHAPES = [(1, 1), (37, 53), (5, 3, 3, 3), (300, 7), (130, 1001), (2, 70_000)]
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "maximize": True},
    "decay": {"weight_decay": 0.1, "maximize": True},
}
ADAM = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "AdamW, quick averages": (
        torch.optim.AdamW,
        {"betas": (0.3, 0.5), "weight_decay": 0.05, "maximize": True},
    ),
    "AdamW, no decay": (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-3}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, L2": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.9, 0.95), "maximize": True}),
}


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Layer:
    """A masked weight, the same as a parameter of a dense optimizer, and gradients for a few steps."""

    def __init__(self, kernels, shape, density=0.3):
        random = torch.Generator().manual_seed(0)
        self.mask = torch.rand(shape, generator=random) < density
        self.before = torch.randn(shape, generator=random)  # inactive places hold something, too
        self.weight = self.before.clone()
        self.dense = self.before.clone().requires_grad_()
        self.structure = topology_calls.csr(kernels, self.mask)
        self.grads = [torch.randn(shape, generator=random) for _ in range(4)]
        self.number = int(self.mask.sum())

    def given(self, step):
        """The gradient as the native step gets it: dense and compact in turn."""
        return self.grads[step] if step % 2 else self.grads[step][self.mask]

    def dense_step(self, optimizer, step):
        self.dense.grad = self.grads[step].clone()
        optimizer.step()

    def unchanged_elsewhere(self):
        return torch.equal(self.weight[~self.mask], self.before[~self.mask])


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgd_gives_the_bits_of_torch(kernels, threads, shape, options):
    layer = Layer(kernels, shape)
    optimizer = torch.optim.SGD([layer.dense], lr=0.1, foreach=False, **options)
    velocity = torch.full((layer.number,), float("nan")) if "momentum" in options else None
    values = torch.empty(layer.number)
    for step in range(4):
        layer.dense_step(optimizer, step)
        step_calls.sgd(
            kernels, layer.weight, layer.given(step), velocity, layer.structure,
            lr=0.1, first=step == 0, values=values, **options,
        )  # fmt: skip
        wanted = layer.dense.detach()[layer.mask]
        if kernels.isa == "generic":  # without a fused multiply-add torch may round otherwise
            torch.testing.assert_close(layer.weight[layer.mask], wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(layer.weight[layer.mask], wanted)
        assert torch.equal(values, layer.weight[layer.mask])
        assert layer.unchanged_elsewhere()


@pytest.mark.parametrize(("kind", "options"), ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adam_follows_torch(kernels, threads, shape, kind, options):
    layer = Layer(kernels, shape)
    optimizer = kind([layer.dense], lr=0.01, foreach=False, **options)
    averages = torch.zeros(layer.number), torch.zeros(layer.number)
    values = torch.empty(layer.number)
    for step in range(4):
        layer.dense_step(optimizer, step)
        step_calls.adam(
            kernels, layer.weight, layer.given(step), averages, layer.structure, step=step + 1, lr=0.01,
            decoupled=kind is torch.optim.AdamW, values=values, **options,
        )  # fmt: skip
        state = optimizer.state[layer.dense]
        pairs = [(averages[0], state["exp_avg"]), (averages[1], state["exp_avg_sq"]), (values, layer.dense)]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted.detach()[layer.mask], rtol=1e-6, atol=1e-7)
        assert torch.equal(values, layer.weight[layer.mask])
        assert layer.unchanged_elsewhere()


def test_adams_bits_are_torchs_but_for_the_square_root(kernels):
    """Averages have torch's bits; so have weights, once its root is correctly rounded as IEEE 754 has it."""
    if kernels.isa == "generic":
        pytest.skip("without a fused multiply-add torch may round otherwise")
    layer = Layer(kernels, (64, 256))
    optimizer = torch.optim.AdamW([layer.dense], lr=0.01, foreach=False)
    averages = torch.zeros(layer.number), torch.zeros(layer.number)
    twin = layer.before.clone()
    for step in range(4):
        layer.dense_step(optimizer, step)
        step_calls.adam(
            kernels, layer.weight, layer.grads[step], averages, layer.structure,
            step=step + 1, lr=0.01, weight_decay=0.01,
        )  # fmt: skip
        state = optimizer.state[layer.dense]
        assert torch.equal(averages[0], state["exp_avg"][layer.mask])
        assert torch.equal(averages[1], state["exp_avg_sq"][layer.mask])
        root = torch.from_numpy(np.sqrt(state["exp_avg_sq"].numpy()))
        bottom = (root / (1 - 0.999 ** (step + 1)) ** 0.5).add_(1e-8)
        twin.mul_(1 - 0.01 * 0.01).addcdiv_(state["exp_avg"], bottom, value=-0.01 / (1 - 0.9 ** (step + 1)))
        assert torch.equal(layer.weight[layer.mask], twin[layer.mask])


def test_the_worked_example(kernels):
    mask = torch.tensor([[True, False, True]])
    weight, grad, velocity = torch.tensor([[1.0, 7.0, 2.0]]), torch.tensor([0.5, -1.0]), torch.zeros(2)
    structure, values = topology_calls.csr(kernels, mask), torch.zeros(2)
    step_calls.sgd(
        kernels, weight, grad, velocity, structure, lr=0.5, momentum=0.5, first=True, values=values
    )
    assert (weight.tolist(), velocity.tolist(), values.tolist()) == ([[0.75, 7, 2.5]], [0.5, -1], [0.75, 2.5])
    step_calls.sgd(
        kernels, weight, grad, velocity, structure, lr=0.5, momentum=0.5, values=values
    )  # v = 0.5 v + g
    assert (weight.tolist(), velocity.tolist()) == ([[0.375, 7, 3.25]], [0.75, -1.5])


def test_non_finite_numbers_pass_through_and_stay_where_they_are(kernels):
    mask = torch.tensor([[True, True, True, False]])
    weight = torch.tensor([[float("inf"), 1.0, 1.0, 1.0]])
    grad = torch.tensor([[1.0, float("nan"), 1.0, float("nan")]])
    step_calls.sgd(kernels, weight, grad, None, topology_calls.csr(kernels, mask), lr=0.5)
    assert weight.isnan().tolist() == [[False, True, False, False]]
    assert weight[0, [0, 2, 3]].tolist() == [float("inf"), 0.5, 1.0]


def test_autograd_learns_of_the_change(kernels):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    structure = topology_calls.csr(kernels, torch.ones(2, 2, dtype=torch.bool))
    before = weight._version
    step_calls.sgd(kernels, weight, torch.ones(2, 2), None, structure, lr=0.1)
    step_calls.adam(
        kernels, weight, torch.ones(4), (torch.zeros(4), torch.zeros(4)), structure, step=1, lr=0.1
    )
    assert weight._version == before + 2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4, 4)])
def test_a_layer_without_connections_stays(kernels, shape):
    weight = torch.ones(shape)
    structure = topology_calls.csr(kernels, torch.zeros(shape, dtype=torch.bool))
    step_calls.sgd(kernels, weight, torch.ones(shape), torch.zeros(0), structure, lr=0.1, momentum=0.9)
    assert (weight == 1).all()


def test_bad_input_is_refused_before_anything_changes(kernels):
    mask = torch.tensor([[True, False], [True, True]])
    structure = topology_calls.csr(kernels, mask)
    weight, grad = torch.ones(2, 2), torch.ones(2, 2)

    def sgd(**changed):
        given = {
            "weight": weight,
            "grad": grad,
            "velocity": None,
            "structure": structure,
            "lr": 0.1,
            **changed,
        }
        step_calls.sgd(kernels, **given)

    for changed, kind, message in [
        ({"momentum": 0.9}, ValueError, "velocity missing"),
        ({"velocity": torch.zeros(3)}, ValueError, "velocity given"),
        ({"velocity": torch.zeros(4), "momentum": 0.9}, ValueError, r"velocity has shape \(4,\)"),
        ({"weight": weight.double()}, TypeError, "weight is torch.float64"),
        ({"weight": torch.ones(3, 2)}, ValueError, "2 rows does not fit"),
        ({"weight": torch.ones(2)}, ValueError, "2 rows does not fit"),
        ({"weight": torch.ones(2, 2).t()}, ValueError, "must be contiguous"),
        ({"grad": torch.ones(2, 3)}, ValueError, "grad has shape"),
        ({"grad": torch.ones(4)}, ValueError, "grad has shape"),
        ({"grad": grad.bfloat16()}, TypeError, "grad is torch.bfloat16"),
        ({"structure": (structure[0].long(), structure[1])}, TypeError, "starts are torch.int64"),
        ({"values": torch.zeros(2)}, ValueError, "values has shape"),
    ]:
        with pytest.raises(kind, match=message):
            sgd(**changed)
    averages = torch.zeros(3), torch.zeros(3)
    for changed in ({"step": 0}, {"step": 1, "betas": (1.0, 0.9)}):
        with pytest.raises(ValueError, match="steps count from 1"):
            step_calls.adam(kernels, weight, grad, averages, structure, lr=0.1, **changed)
    assert (weight == 1).all()
