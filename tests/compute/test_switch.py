import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_rigl.compute import switch
from lightning_rigl.compute.linear import SparseProduct


class Own(nn.Linear):
    """A stranger's layer with nothing changed in its product."""

    def extra_repr(self):
        return "own"


class Scaled(nn.Linear):
    """A stranger's layer with another product."""

    def forward(self, x):
        return 2 * super().forward(x)


def sparse(layer, backend="torch"):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    return SparseProduct(layer.weight, layer.weight.detach() != 0, backend)


@pytest.fixture(params=[nn.Linear, Own])
def on(request):
    """A model whose first layer computes sparsely, and what it was before."""
    model = nn.Sequential(request.param(12, 8), nn.ReLU(), nn.Linear(8, 2))
    product = sparse(model[0])
    before = copy.deepcopy(model)
    switch.on({model[0]: product})
    yield model, before
    switch.off(model)
    assert type(model[0]) is request.param
    assert vars(model[0]).keys() == vars(before[0]).keys()


def test_a_stranger_sees_the_same_module(on):
    model, before = on
    assert isinstance(model[0], type(before[0]))
    assert type(model[0]).__name__ == type(before[0]).__name__
    assert repr(model) == repr(before)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    model.load_state_dict(before.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), before(x))


def test_the_product_is_sparse(on, monkeypatch):
    model, _ = on
    seen = []
    monkeypatch.setattr(SparseProduct, "__call__", lambda self, x, bias: seen.append(x) or x[:, :8])
    model(torch.randn(3, 12))
    assert len(seen) == 1


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save"])
def test_copies_are_of_the_own_class_and_compute_densely(on, how):
    model, before = on
    if how == "deepcopy":
        found = copy.deepcopy(model)
    elif how == "copy":
        found = nn.Sequential(copy.copy(model[0]), *model[1:])
    elif how == "pickle":
        found = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        found = torch.load(file, weights_only=False)
    assert type(found[0]) is type(before[0])
    assert vars(found[0]).keys() == vars(before[0]).keys()
    x = torch.randn(3, 12)
    torch.testing.assert_close(found(x), before(x))
    assert type(model[0]) is not type(before[0]), "the model itself is as it was"


def test_hooks_on_the_layer_still_run(on):
    model, _ = on
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.randn(3, 12))
    assert seen == [(3, 8)]


def test_twice_on_is_once_on(on):
    model, before = on
    switch.on({model[0]: sparse(model[0])})
    switch.off(model)
    assert type(model[0]) is type(before[0])


def test_a_weight_that_was_replaced_is_used_densely(on):
    model, _ = on
    model[0].weight = nn.Parameter(torch.ones(8, 12))
    x = torch.randn(3, 12)
    expected = x.sum(1, keepdim=True) + model[0].bias
    torch.testing.assert_close(model[0](x), expected)


def test_a_parametrized_weight_is_used_densely(on):
    model, _ = on
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    model(torch.randn(3, 12)).sum().backward()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")


def test_who_is_able():
    tied = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "own": Own(8, 8),
            "scaled": Scaled(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv1d(8, 8, 1),
            "tied": tied,
            "again": nn.Linear(8, 8),
            "embedding": nn.Embedding(8, 8),
            "head": nn.Linear(8, 8),
        }
    )
    model["again"].weight = tied.weight
    model["head"].weight = model["embedding"].weight
    able = switch.able(model)
    found = {name: able.get(layer.weight, []) for name, layer in model.items() if hasattr(layer, "weight")}
    assert found == {
        "plain": [model["plain"]],
        "own": [model["own"]],
        "scaled": [],
        "conv": [],
        "tied": [tied, model["again"]],
        "again": [tied, model["again"]],
        "embedding": [],
        "head": [],
    }
    assert model["attention"].out_proj.weight not in able


def test_a_class_that_somebody_else_put_on_stays():
    second = nn.Sequential(nn.Linear(12, 8))
    switch.on({second[0]: sparse(second[0])})
    nn.utils.parametrizations.weight_norm(second[0])
    x = torch.randn(3, 12)
    expected = second(x)
    pickled = copy.deepcopy(second)
    switch.off(second)
    torch.testing.assert_close(second(x), expected)
    torch.testing.assert_close(pickled(x), expected)
    assert nn.utils.parametrize.is_parametrized(second[0])


def test_modes_that_have_no_sparse_product_are_dense(on):
    model, before = on
    x, tangent = torch.randn(3, 12), torch.randn(3, 12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(model[0](dual)).tangent
    torch.testing.assert_close(found, tangent @ before[0].weight.t())
    row = torch.randn(12, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda r: model[0](r[None])[0], row, vectorize=True)
    torch.testing.assert_close(jacobian, before[0].weight.detach())
    second = nn.Sequential(nn.Linear(12, 8))
    switch.on({second[0]: sparse(second[0])})
    torch.testing.assert_close(torch.jit.script(second)(x), second(x))


LAYOUTS = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[:2], x]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_another_layout_are_multiplied_densely(on, layout):
    model, before = on
    x = LAYOUTS[layout](torch.randn(3, 12))
    found, expected = model[0](x), before[0](x)
    pairs = zip(found.unbind(), expected.unbind(), strict=True) if x.is_nested else [(found, expected)]
    for one, other in pairs:
        torch.testing.assert_close(one.to_dense(), other.to_dense())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_leaves_the_module_as_it_is(on):
    model, before = on
    layer, x = model[0], torch.randn(3, 12)
    scripted = torch.jit.script(model)
    assert model[0] is layer
    assert isinstance(layer, switch._Sparse)
    torch.testing.assert_close(scripted(x), before(x))
    del vars(layer)["__overloads__"]  # torch leaves it on each layer that it compiles


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_needs_nothing_of_this_package(on, grad):
    model, before = on
    x, file = torch.randn(3, 12), io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    traced = torch.jit.load(file)
    torch.testing.assert_close(traced(x), before(x))
    assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith("lightning_rigl")]


def test_what_a_class_asks_of_its_subclasses_is_not_asked_of_ours():
    known = []

    class Tagged(nn.Linear):
        def __init_subclass__(cls, *, tag, **rest):
            super().__init_subclass__(**rest)
            known.append(tag)

    class Layer(Tagged, tag="mine"):
        pass

    model = nn.Sequential(Layer(6, 4))
    switch.on({model[0]: sparse(model[0])})
    assert isinstance(model[0], switch._Sparse)
    assert known == ["mine"]
    switch.off(model)
    assert type(model[0]) is Layer


def test_a_weight_may_change_before_the_backward_pass_where_a_dense_one_may(on):
    model, before = on
    x = torch.randn(3, 12)
    for net in (model, before):
        loss = net[0](x).square().sum()
        with torch.no_grad():
            net[0].weight.mul_(0.5)
        loss.backward()
    mask = before[0].weight != 0
    torch.testing.assert_close(model[0].weight.grad, before[0].weight.grad * mask)
