"""A model and an example of its input -> a table of costs, without values; or bare shapes -> the same."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_rigl import Uniform
from lightning_rigl.flops.formulas import actual_step_cost
from lightning_rigl.flops.measure import cost_table, measure
from lightning_rigl.flops.planning import plan_flops


def test_measuring_leaves_the_model_and_the_random_generator_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        table = measure(model, (4, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [layer.weight_gradient for layer in table.layers] == [96, 32]


class Noisy(nn.Module):
    """An auxiliary head in training, random depth, and noise that is made without a device."""

    def __init__(self):
        super().__init__()
        self.net, self.auxiliary = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.net(x) + torch.randn(6)
        if torch.rand((), device="cpu") < 0:
            return x
        return (x, self.auxiliary(x)) if self.training else x


def test_the_training_mode_is_measured_with_its_random_numbers():
    model = Noisy().eval()
    generator = torch.get_rng_state()
    assert [layer.name for layer in measure(model, (4, 6)).layers] == ["net.weight", "auxiliary.weight"]
    assert torch.equal(torch.get_rng_state(), generator)


class Captioner(nn.Module):
    """Two inputs, one of them in a dict, a position table made without a device, a head tied to a lookup."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(12, 8)
        self.image, self.head = nn.Linear(30, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, batch, images):
        places = self.places(torch.arange(batch["words"].shape[1]))
        return self.head(self.words(batch["words"]) + places + self.image(images)[:, None])


def test_several_inputs_of_several_types():
    words = {"words": torch.zeros(4, 12, dtype=torch.int64)}
    table = measure(Captioner(), words, (4, 30))
    assert {layer.name: layer.forward for layer in table.layers} == {
        "words.weight": 9600,
        "image.weight": 480,
    }
    plan = plan_flops(Captioner(), words, (4, 30), sparsity=0.5, distribution=Uniform(dense_first=False))
    assert {row.name: row.active for row in plan.layers} == {"words.weight": 400, "image.weight": 120}


class Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=True)


def test_what_checkpointing_repeats_is_part_of_the_actual_cost():
    product = 2 * 6 * 6
    table = measure(Recomputing(), (4, 6))
    assert actual_step_cost(table) == (3 * 3 - 1 + 2) * product
    with torch.no_grad():
        assert measure(Recomputing(), (4, 6)) == table


class ReadsValues(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Linear(784, 10), [(4, 783)], r"Linear cannot be measured with \(4, 783\) float32"),
        (ReadsValues(4, 4), [(4, 4)], "if the forward pass reads values, run it once inside a Tracer"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), [(1, 4)], "a batch norm may need two samples"),
        (nn.Module(), [(1, 4)], "missing the required"),
        (nn.Linear(784, 10), [torch.tensor(1.0)], "holds no batch"),
        (nn.Linear(784, 10), [], "holds no batch"),
    ],
    ids=["shape", "values", "one sample", "no forward", "no dimension", "nothing"],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(model, example, message):
    with pytest.raises(ValueError, match=message):
        measure(model, *example)


@pytest.mark.parametrize("entry", [(10, 100), ((10, 100), 0), (10, 1), "ab", ((10.0, 1), 1)], ids=str)
def test_a_shape_of_another_form_is_refused_by_name(entry):
    with pytest.raises(ValueError, match="fc: expected"):
        cost_table({"fc": entry})


def test_a_shape_is_an_example_of_floats():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    assert measure(model, (2, 3, 8, 8)) == measure(model, torch.zeros(2, 3, 8, 8))


def test_bare_shapes_make_the_table_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    shapes = {"0.weight": ((4, 3, 3, 3), 6 * 6), "2.weight": ((5, 144), 1)}
    assert cost_table(shapes) == measure(model, (2, 3, 8, 8))


def test_a_cost_is_that_of_one_sample():
    model = nn.Linear(6, 8)
    assert measure(model, (4, 6)) == measure(model, (1, 6))
    by_time = measure(model, (50, 4, 6), samples=4)
    assert by_time.layers[0].forward == 50 * measure(model, (4, 6)).layers[0].forward


def test_a_model_without_values_is_measured_too():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    assert measure(model, (4, 6)) == cost_table({"0.weight": ((8, 6), 1), "2.weight": ((2, 8), 1)})
