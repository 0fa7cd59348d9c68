"""The same run twice is the same run bit for bit, and no operator of the package stands in its way."""

import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rigl import FLOPsCallback, RigLCallback, Sparsifier, UpdateSchedule
from lightning_rigl.topology import bits
from tests.callbacks.problems import Small, data, trainer

SCHEDULE = UpdateSchedule(every=6, end=30, drop_fraction=0.5)
METHODS = pytest.mark.parametrize("method", ["rigl", "set", "static"])

# What the documentation of torch.use_deterministic_algorithms names, and a few that earlier versions name.
NEVER = {
    *("bmm", "gather", "histc", "index_add", "index_copy", "index_reduce", "index_select", "kthvalue"),
    *("logcumsumexp", "median", "nanmedian", "put", "repeat_interleave", "resize", "scatter"),
    *("scatter_add", "scatter_reduce", "grid_sample"),
}


def writes_in_any_order(values, indices, new, accumulate=False):
    """Whether places are written to more than once: any order will do where each is written to once."""
    whole = [index for index in indices if index is not None and index.dtype != torch.bool]
    return accumulate or any(len(index.unique()) < index.numel() for index in whole)


UNDER_A_CONDITION = {
    "bincount": lambda values, weights=None, minlength=0: weights is not None,
    "cumsum": lambda values, dim, dtype=None: values.is_floating_point(),
    "cumprod": lambda values, dim, dtype=None: values.is_floating_point(),
    "index_put": writes_in_any_order,
}


class Operators(TorchDispatchMode):
    """The operators that are called, and those of them whose result may differ from call to call on CUDA."""

    def __init__(self):
        super().__init__()
        self.seen, self.refused = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_").removesuffix("_impl")
        self.seen.add(name)
        if name in NEVER or (name in UNDER_A_CONDITION and UNDER_A_CONDITION[name](*args, **(kwargs or {}))):
            self.refused.append(str(func))
        return func(*args, **(kwargs or {}))


def test_every_documented_operator_is_looked_for():
    text = torch.use_deterministic_algorithms.__doc__
    documented = set(re.findall(r":func:`torch\.(?:Tensor\.|nn\.functional\.)?(\w+)`", text))
    documented -= {"set_deterministic_debug_mode", "interpolate", "__getitem__"}  # a getitem is index
    assert {name.strip("_") for name in documented} <= NEVER | UNDER_A_CONDITION.keys()


def test_the_recorder_sees_what_it_must_refuse():
    values, new, index = torch.rand(8), torch.rand(3), torch.tensor([0, 0, 1])
    with Operators() as operators:
        values.cumsum(0), torch.bincount(index, weights=new)
        values.put_(index, new), values.index_put_((index,), new), values.scatter_add_(0, index, new)
        values.index_put_((torch.tensor([2, 3, 4]),), new, accumulate=True)
        values.median(0), values.kthvalue(2), values.histc(4)
        assert len(operators.refused) == 9
        operators.refused.clear()
        index.cumsum(0), torch.bincount(index), values.topk(2)
        values[torch.tensor([2, 3])] = 1.0
        values[values > 0.5] = 0.0
        assert operators.refused == []


@METHODS
@pytest.mark.parametrize(
    ("init", "dtype"),
    [("random", torch.float32), ("magnitude", torch.float64), ("magnitude", torch.bfloat16)],
)
def test_no_operator_is_nondeterministic(method, init, dtype):
    """Of construction, an ordinary step, an update and a state; the layer is large enough for a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 4)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with Operators() as operators:
        sparsifier = Sparsifier(
            model, 0.8, method, schedule=UpdateSchedule(every=1, end=9), init=init, seed=0
        )
        sparsifier.start()
    for step in range(2):
        model(torch.randn(8, 400, dtype=dtype)).square().mean().backward()
        with operators:
            assert sparsifier.before_step(optimizer, step) == (step == 1 and method != "static")
        optimizer.step()
        with operators:
            sparsifier.after_step()
    with operators:
        sparsifier.reset_state(optimizer)
        sparsifier.mask_weights()
        sparsifier.load_state_dict(sparsifier.state_dict())
        for mask in sparsifier.masks.values():
            bits.digest(mask)
    assert {"topk", "bincount", "cumsum", "index_put", "bitwise_and"} <= operators.seen
    assert operators.refused == []


class Wide(Small):
    """A layer of 120,000 weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 400), nn.Tanh(), nn.Linear(400, 300), nn.Linear(300, 4))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.fixture
def _as_it_was(monkeypatch):
    """Trainer(deterministic=True) changes the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_as_it_was")
@METHODS
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_bitwise_equal(method, deterministic):
    def run(mode):
        torch.manual_seed(0)
        module, rigl = Wide(), RigLCallback(0.8, method, schedule=SCHEDULE)
        trainer(rigl, FLOPsCallback(), deterministic=mode).fit(module, data())
        assert torch.are_deterministic_algorithms_enabled() == mode
        torch.rand(7)  # whatever a run in between draws
        return {**module.state_dict(), **{f"mask of {name}": mask for name, mask in rigl.masks.items()}}

    first, second = run(False), run(deterministic)
    assert len(first) == 9
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
