"""Which parameters are sparse by default, and how a user chooses others."""

import pytest
import torch
from torch import nn

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.model.layers import clean_name, frozen, named_parameters, select


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.conv1d, self.conv3d = nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(8, 6, proj_size=4)
        self.cell = nn.GRUCell(4, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.head = nn.Linear(8, 20, bias=False)
        self.free = nn.Parameter(torch.zeros(3, 3))


def test_the_default_selection():
    assert list(select(Everything())) == [
        "conv.weight",
        "grouped.weight",
        "conv1d.weight",
        "conv3d.weight",
        "up.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_hr_l0",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "head.weight",
    ]


def test_include_replaces_the_default_and_exclude_removes():
    chosen = select(Everything(), include=["embed", "free", "depth", "head"], exclude=["head"])
    assert set(chosen) == {"embed.weight", "free", "depthwise.weight"}
    assert "head.weight" not in select(Everything(), exclude=["^head"])


def test_a_tied_weight_is_one_layer_and_stays_dense_with_its_embedding():
    model = Everything()
    model.head.weight = model.embed.weight
    assert "embed.weight" not in select(model)
    assert "head.weight" not in select(model)
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twice[1].weight = twice[0].weight
    assert list(select(twice)) == ["0.weight"]


def test_frozen_parameters_stay_dense():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert list(select(model)) == ["1.weight"]
    assert list(frozen(model)) == ["0.weight"]
    before = model[0].weight.clone()
    Sparsifier(model, 0.5)
    assert torch.equal(before, model[0].weight)


def test_names_are_cleaned_of_wrappers():
    assert clean_name("a._orig_mod.b._checkpoint_wrapped_module._fsdp_wrapped_module.weight") == "a.b.weight"
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"))
    assert list(select(model)) == ["0.0.weight"]


def test_parametrized_weights_stay_dense():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(select(model)) == ["1.weight"]


def test_what_cannot_be_selected_is_said():
    with pytest.raises(ValueError, match="not initialised yet"):
        select(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(ValueError, match="no parameter to make sparse"):
        select(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="sparse gradients"):
        select(nn.Sequential(nn.Embedding(9, 4, sparse=True)), include=["0"])
    with pytest.raises(ValueError, match="bias"):
        select(nn.Sequential(nn.Linear(4, 4)), include=["bias"])


@pytest.mark.parametrize(
    "kind", ["lstm", "attention", "tied", "channels_last", "bfloat16", "float16", "float64"]
)
def test_odd_parameters_train_sparse(kind):
    """Storage stays, zeros stay, counts stay."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}.get(
        kind, torch.float32
    )
    x = torch.randn(4, 5, 8, dtype=dtype)
    if kind == "lstm":
        model = nn.LSTM(8, 6, num_layers=2, bidirectional=True)
        loss = lambda: model(x)[0].square().mean()  # noqa: E731
    elif kind == "attention":
        model = nn.MultiheadAttention(8, 2)
        loss = lambda: model(x, x, x)[0].square().mean()  # noqa: E731
    elif kind == "tied":
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        loss = lambda: model(x).square().mean()  # noqa: E731
    elif kind == "channels_last":
        model = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
        image = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
        loss = lambda: model(image).square().mean()  # noqa: E731
    else:
        model = nn.Linear(8, 6).to(dtype)
        loss = lambda: model(x).square().mean()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)  # AdamW's eps is 0 in float16
    sparsifier = Sparsifier(model, 0.6, schedule=UpdateSchedule(every=2, end=12), seed=0)
    sparsifier.start()
    pointers = [p.data_ptr() for p in model.parameters()]
    counts = dict(sparsifier.counts)
    for step in range(12):
        optimizer.zero_grad()
        loss().backward()
        sparsifier.before_step(optimizer, step)
        optimizer.step()
        sparsifier.after_step()
        for name, parameter in sparsifier.parameters.items():
            assert (parameter[~sparsifier.masks[name]] == 0).all()
            assert int(sparsifier.masks[name].sum()) == counts[name]
    assert sparsifier.updates == 5
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_what_a_parallel_wrapper_calls_module_is_no_part_of_a_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))  # a "module" of the user's own
            self.other = nn.DataParallel(nn.DataParallel(nn.Linear(4, 4)))

    assert list(named_parameters(nn.DataParallel(Two()))) == [
        "module.0.weight",
        "module.0.bias",
        "other.weight",
        "other.bias",
    ]
    assert list(select(nn.DataParallel(Two()), exclude=["other"])) == ["module.0.weight"]
