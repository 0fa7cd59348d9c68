import json
import os
import struct
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_rigl.compute.optimizers import ActiveSGD
from lightning_rigl.export import container
from lightning_rigl.export.files import load, load_masks, save


def sparse(*shape, density=0.1, dtype=torch.float32):
    return torch.randn(shape).masked_fill(torch.rand(shape) >= density, 0.0).to(dtype)


def assert_same(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    bits = (it.detach().contiguous().view(-1).view(torch.uint8) for it in (one, other))
    assert one.numel() == 0 or torch.equal(*bits)


def assert_same_tree(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_tree(a, b)
    elif isinstance(one, torch.Tensor):
        assert_same(one, other)
    else:
        assert one == other


def network(density=0.1):
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 200))
    masks = {f"{i}.weight": torch.rand_like(net[i].weight) < density for i in (0, 3)}
    for name, mask in masks.items():
        net.get_parameter(name).data.masked_fill_(~mask, 0.0)
    return net, masks


def test_a_model_its_masks_and_its_optimizer_come_back(tmp_path):
    net, masks = network()
    grown = masks["3.weight"].nonzero()[0]
    net[3].weight.data[tuple(grown)] = 0.0  # active, and zero
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.7, 0.9), amsgrad=True)
    for _ in range(2):
        net(torch.randn(4, 8, 4, 4)).square().mean().backward()
        for name, mask in masks.items():
            net.get_parameter(name).grad.masked_fill_(~mask, 0.0)
        optimizer.step()
    file = tmp_path / "net.safetensors"
    save(net, file, masks, optimizer)
    assert_same_tree(load(file), dict(net.state_dict()))
    assert_same_tree(load_masks(file), masks)
    other, _ = network()
    fresh = torch.optim.AdamW(other.parameters(), lr=5.0)
    load(file, other, fresh)
    assert_same_tree(dict(other.state_dict()), dict(net.state_dict()))
    assert_same_tree(fresh.state_dict(), optimizer.state_dict())


def test_the_file_is_as_small_as_promised(tmp_path):
    weight, mask = torch.randn(1000, 1000), torch.rand(1000, 1000) < 0.1
    weight.masked_fill_(~mask, 0.0)
    save({"weight": weight}, tmp_path / "bits", {"weight": mask})
    size = (tmp_path / "bits").stat().st_size
    assert size < 4 * mask.sum() + weight.numel() / 8 + 1500
    assert weight.nbytes / size > 7.4
    parameter = nn.Parameter(weight)
    adam = torch.optim.Adam([parameter])
    parameter.grad = weight.clone()
    adam.step()
    parameter.data.masked_fill_(~mask, 0.0)
    save({"weight": parameter}, tmp_path / "adam", {"weight": mask}, adam)
    assert 3 * weight.nbytes / (tmp_path / "adam").stat().st_size > 8.8  # the places are there once
    few = weight.masked_fill(torch.rand(1000, 1000) < 0.8, 0.0)
    save({"weight": few}, tmp_path / "gaps")
    assert few.nbytes / (tmp_path / "gaps").stat().st_size > 35


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_dtypes(tmp_path, dtype):
    state = {"sparse": sparse(50, 50).to(dtype), "dense": torch.randn(7).to(dtype)}
    save(state, tmp_path / "file")
    assert_same_tree(load(tmp_path / "file"), state)


def test_tensors_of_every_kind(tmp_path):
    base = sparse(40, 40)
    base[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-42])
    state = {
        "base": base,
        "counter": torch.tensor(7),
        "flags": torch.rand(30) < 0.5,
        "integers": torch.zeros(1000, dtype=torch.int32),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(-0.0),
        "transposed": base.t(),
        "part": base[3:9],
        "row of it": base[4],
        "holes": base[::2, 1:],
        "last": sparse(8, 16, 3, 3).to(memory_format=torch.channels_last),
        "dense last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "all zero": torch.zeros(500),
        "a/b:c d.é": torch.ones(2),
    }
    save(state, tmp_path / "file")
    back = load(tmp_path / "file")
    assert_same_tree(back, state)
    for name in ("last", "dense last", "transposed"):
        assert back[name].stride() == state[name].stride()


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    for weight in (torch.randn(100, 100), sparse(100, 100)):
        save({"a": weight}, tmp_path / "one")
        save({"a": weight, "b": weight}, tmp_path / "two")
        sizes = [(tmp_path / name).stat().st_size for name in ("one", "two")]
        assert sizes[1] < sizes[0] + 500
        back = load(tmp_path / "two")
        assert back["a"].data_ptr() == back["b"].data_ptr()
        back["a"][0, 0] = 5.0
        assert back["b"][0, 0] == 5.0


def test_parts_of_one_memory(tmp_path):
    base = torch.randn(12, 10)
    state = {"all": base, "rows": base[3:9], "others": base[5:], "read otherwise": base.view(10, 12)}
    save(state, tmp_path / "file")
    assert_same_tree(load(tmp_path / "file"), state)


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path):
    state = {"dense": torch.ones(1000), "sparse": sparse(100, 100)}
    save(state, tmp_path / "file")
    back = load(tmp_path / "file")
    with open(tmp_path / "file", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(tmp_path / "file"))
    assert_same_tree(back, state)


def test_other_readers_see_an_ordinary_safetensors_file(tmp_path):
    save({"weight": sparse(100, 100), "bias": torch.ones(3)}, tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert set(file.keys()) == {"model/weight/values", "model/weight/places", "model/bias/values"}
        assert file.metadata()["format"] == "lightning_rigl.packed"
        assert file.metadata()["version"] == "1"


def test_masks_without_zeros_and_names_with_prefixes(tmp_path):
    weight, mask = torch.randn(100, 100), torch.rand(100, 100) < 0.3
    save({"net._orig_mod.weight": weight}, tmp_path / "file", {"net.weight": mask})  # latent weights
    assert_same_tree(load(tmp_path / "file"), {"net._orig_mod.weight": weight})
    assert_same_tree(load_masks(tmp_path / "file"), {"net.weight": mask})
    save({"weight": weight}, tmp_path / "file")
    assert load_masks(tmp_path / "file") == {}


@pytest.mark.parametrize("place", [0, 4, 100, 0.3, 0.5, 0.9, 0.999])
def test_a_changed_byte_is_found(tmp_path, place):
    save(network()[0], tmp_path / "file")
    data = bytearray((tmp_path / "file").read_bytes())
    data[place if isinstance(place, int) else int(place * len(data))] ^= 0x10
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged|cannot be read|was not written by|has version"):
        load(tmp_path / "file")


def test_every_byte_counts(tmp_path):
    save({"w": sparse(20, 20)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in [*range(0, start, 23), *range(start, len(whole))]:
        (tmp_path / "file").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if whole[place : place + 1] != b" ":  # the header is filled up with spaces
            with pytest.raises(ValueError, match="file"):
                load(tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(tmp_path, share):
    save(network()[0], tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cut off, damaged or of another kind"):
        load(tmp_path / "file")


def test_foreign_and_newer_files_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    with pytest.raises(ValueError, match=r"no file at .*file"):
        load(file)
    with pytest.raises(ValueError, match="no file at"):
        load(tmp_path)
    torch.save({"weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        load(file)
    safetensors.torch.save_file({"weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"was not written by export.save: its format is 'pt'"):
        load_masks(file)
    monkeypatch.setattr(container, "VERSION", 2)
    save({"weight": torch.ones(3)}, file)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2 of its format, and this lightning-rigl reads 1"):
        load(file)


def test_a_description_that_does_not_fit_its_tensors_is_refused(tmp_path):
    file = tmp_path / "file"
    content = {"model": {"w": {"dtype": "float32", "shape": [4], "order": [0], "encoding": "whole"}}}
    for values in (torch.ones(3), torch.ones(4, dtype=torch.float16)):
        content["model"]["w"]["values"] = values
        container.write(file, content)  # its checksums are right
        with pytest.raises(ValueError, match="is damaged: w: "):
            load(file)


def test_nothing_is_changed_by_what_does_not_fit(tmp_path):
    net, masks = network()
    file = tmp_path / "file"
    save(net, file, masks)
    other, _ = network()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(ValueError, match="holds no optimizer; give optimizer= to"):
        load(file, other, optimizer)
    save(net, file, optimizer=torch.optim.SGD(net[0].parameters(), 0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, and this one has \[6\]"):
        load(file, other, optimizer)
    assert_same_tree(dict(other.state_dict()), before)
    with pytest.raises(ValueError, match=r"0.weight is \(16, 8, 3, 3\) in the file and \(9, 8, 3, 3\)"):
        load(file, nn.Sequential(nn.Conv2d(8, 9, 3), *other[1:]))
    with pytest.raises(ValueError, match=r"another model: 1.bias is in the file only"):
        load(file, other[:1])


class OwnSGD(torch.optim.SGD):
    """Somebody's."""


@pytest.mark.parametrize(
    ("saved", "given", "words"),
    [
        (torch.optim.Adam, torch.optim.SGD, "the state of Adam, and this is SGD"),
        (torch.optim.SGD, torch.optim.Adam, "the state of SGD, and this is Adam"),
        (torch.optim.Adam, torch.optim.AdamW, "the state of Adam, and this is AdamW"),
        (torch.optim.Adam, torch.optim.Adamax, "the state of Adam, and this is Adamax"),
        (torch.optim.SGD, OwnSGD, ""),
        (torch.optim.SGD, ActiveSGD, ""),
    ],
)
def test_the_state_of_another_optimizer_is_refused(tmp_path, saved, given, words):
    net, _ = network()
    other, _ = network()
    optimizer, fresh = saved(net.parameters(), 0.1), given(other.parameters(), 0.2)
    net(torch.randn(4, 8, 4, 4)).square().mean().backward()
    optimizer.step()
    save(net, tmp_path / "file", optimizer=optimizer)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    if words:
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "file", other, fresh)
        assert_same_tree(dict(other.state_dict()), before)
        assert fresh.param_groups[0]["lr"] == 0.2
    else:
        load(tmp_path / "file", other, fresh)
        assert fresh.param_groups[0]["lr"] == 0.1


def test_state_of_active_connections_goes_to_an_optimizer_that_keeps_such_state(tmp_path):
    net, _ = network()
    optimizer = ActiveSGD(net.parameters(), 0.1, momentum=0.9)
    optimizer.state[net[3].weight]["momentum_buffer"] = torch.randn(1280)
    save(net, tmp_path / "file", optimizer=optimizer)
    load(tmp_path / "file", net, ActiveSGD(net.parameters(), 0.1, momentum=0.9))
    with pytest.raises(
        ValueError, match=r"momentum_buffer of parameter 4 is of active connections.* ActiveSGD"
    ):
        load(tmp_path / "file", net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": torch.eye(3).to_sparse()}, "a: a torch.sparse_coo tensor cannot be packed"),
        ({"a": torch.ones(3), "b._extra_state": {"x": 1}}, r"b\._extra_state: only tensors can be saved"),
        ({"a": torch.empty(3, device="meta")}, "a: a meta tensor"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, state, words):
    with pytest.raises(TypeError, match=words):
        save(state, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    net, masks = network()
    with pytest.raises(ValueError, match="in a folder that exists"):
        save(net, tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="in a folder that exists"):
        save(net, tmp_path)
    with pytest.raises(ValueError, match=r"9.weight: there is a mask of that name and no tensor"):
        save(net, tmp_path / "file", {"9.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match=r"3.weight: the mask is \(16, 8, 3, 3\) and the tensor \(200, 64\)"):
        save(net, tmp_path / "file", {"3.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match="a mask is bool"):
        save(net, tmp_path / "file", {"0.weight": masks["0.weight"].float()})
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.param_groups[0]["owner"] = object()
    with pytest.raises(TypeError, match=r"optimizer/param_groups/0/owner: a object cannot be saved"):
        save(net, tmp_path / "file", optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "file"
    save({"a": torch.ones(3)}, file)

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save({"a": torch.zeros(3)}, file)
    assert_same(load(file)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [file]


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(tmp_path):
    save({"a": torch.ones(3)}, tmp_path / "file")
    (tmp_path / "ordinary").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("file", "ordinary")]
    assert modes[0] == modes[1]


def test_without_safetensors_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save({"a": torch.ones(3)}, tmp_path / "file")


def test_plain_data_comes_back_with_its_types(tmp_path):
    shared = torch.arange(3)
    content = {
        "numbers": [1, 2.5, float("inf"), -0.0, True, None, "text"],
        "tuple": (1, (2, [3])),
        "keys": {1: "a", "1": "b", 2.5: {}},
        "!tensor": {"!x": 1},
        "tensors": {"a": shared, "b": shared, "c": torch.ones(2, 2)},
        "": [],
    }
    container.write(tmp_path / "file", content)
    back = container.read(tmp_path / "file")
    assert_same_tree(back, content)
    assert back["tensors"]["a"] is back["tensors"]["b"]
    assert json.dumps(back["numbers"]) == json.dumps(content["numbers"])
    with pytest.raises(TypeError, match="where/0: a set cannot be saved"):
        container.write(tmp_path / "file", {"where": [{1}]})
