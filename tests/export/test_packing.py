"""Entries of single tensors, and Lightning checkpoints made of them."""

import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_rigl.export.checkpoints import pack_checkpoint, unpack_checkpoint
from lightning_rigl.export.packing import Packer, is_entry, memory_order, unpack, unpack_mask
from lightning_rigl.topology import bits

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def bytes_of(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert bytes_of(one).equal(bytes_of(other)) if one.numel() else other.numel() == 0


def sparse(*shape, density=0.1, dtype=torch.float32):
    return (torch.randn(shape) * (torch.rand(shape) < density)).abs().to(dtype)


def gaps_of(kept, size):
    """The slow twin: walk over the weights and count zeros; 255 is 255 zeros and no value."""
    code, zeros = [], 0
    for i in range(size):
        if i in kept:
            code.append(zeros)
            zeros = 0
        else:
            zeros += 1
            if zeros == 255:
                code.append(255)
                zeros = 0
    return code[: len(code) - next((i for i, c in enumerate(reversed(code)) if c != 255), len(code))]


def test_the_worked_example_in_bits():
    # 200 weights, 0 1 8 and 9 to 29 are kept: more than one in twenty
    weight = torch.zeros(200)
    weight[[0, 1, *range(8, 30)]] = torch.arange(1.0, 25.0)
    entry = Packer().pack(weight)
    assert entry["encoding"] == "bits"
    assert entry["places"].tolist() == [0b11, 0b11111111, 0b11111111, 0b00111111] + [0] * 21
    assert entry["values"].tolist() == list(range(1, 25))
    assert (entry["dtype"], entry["shape"], entry["order"]) == ("float32", [200], [0])


def test_the_worked_example_in_gaps():
    weight = torch.zeros(2000)
    weight[[3, 4, 260, 516, 1800]] = torch.arange(1.0, 6.0)
    # before 260: 255 zeros, so an escape and none; before 516 the same; before 1800: 1283 = 5 * 255 + 8
    entry = Packer().pack(weight)
    assert entry["encoding"] == "gaps"
    assert entry["places"].tolist() == [3, 0, 255, 0, 255, 0, 255, 255, 255, 255, 255, 8]
    assert entry["values"].tolist() == [1, 2, 3, 4, 5]


@given(st.data())
def test_gaps_are_those_of_the_slow_twin(data):
    size = data.draw(st.integers(1000, 3000))
    kept = data.draw(st.sets(st.integers(0, size - 1), max_size=size // 20))
    weight = torch.zeros(size)
    weight[sorted(kept)] = 1.0
    entry = Packer().pack(weight)
    assert entry["encoding"] == "gaps"
    assert entry["places"].tolist() == gaps_of(kept, size)
    assert unpack(entry).equal(weight)


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    density=st.sampled_from([0.0, 0.01, 0.04, 0.1, 0.5, 0.99, 1.0]),
    dtype=st.sampled_from(FLOATS),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_tensor_comes_back_bit_by_bit(shape, density, dtype, masked, seed):
    torch.manual_seed(seed)
    tensor = sparse(*shape, density=density, dtype=dtype)
    mask = torch.rand(shape) < density if masked else None
    entry = Packer().pack(tensor, mask)
    assert_same(unpack(entry), tensor)
    if masked:
        assert unpack_mask(entry).equal(mask)
    else:
        assert unpack_mask(entry) is None


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_only_plus_zero_is_a_zero(dtype):
    tensor = torch.zeros(4000, dtype=dtype)
    strange = [-0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).tiny / 4]
    tensor[:5] = torch.tensor(strange, dtype=dtype)
    tensor[5] = -tensor[1]  # nan with a sign
    entry = Packer().pack(tensor)
    assert len(entry["values"]) == 6
    assert_same(unpack(entry), tensor)


def test_the_smallest_of_the_encodings_is_taken():
    packer = Packer()
    for density, encoding in ((0.01, "gaps"), (0.3, "bits"), (0.9, "bits"), (1.0, "whole")):
        tensor = sparse(100, 100, density=density) if density < 1 else torch.rand(100, 100) + 1
        entry = packer.pack(tensor)
        assert entry["encoding"] == encoding, density
        size = entry["values"].nbytes + entry.get("places", torch.empty(0)).nbytes
        assert size < tensor.nbytes or encoding == "whole"
    assert packer.pack(torch.zeros(20))["encoding"] == "whole", "an entry costs more than twenty zeros"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.complex128])
def test_what_is_not_floating_stays_whole(dtype):
    tensor = torch.zeros(50, 50).to(dtype)
    entry = Packer().pack(tensor)
    assert entry["encoding"] == "whole"
    assert_same(unpack(entry), tensor)


def strange_tensors():
    base = sparse(24, 40)
    yield "transposed", base.t()
    yield "every other row", base[::2]
    yield "expanded", base[:1].expand(24, 40)
    yield "channels last", sparse(8, 16, 3, 3).to(memory_format=torch.channels_last)
    yield "permuted", sparse(4, 5, 6, 7).permute(3, 1, 0, 2)
    yield "no dimension", torch.tensor(0.0)
    yield "empty", torch.empty(0, 5)
    yield "requires grad", nn.Parameter(base.clone())
    yield "negated view", torch._neg_view(base)


@pytest.mark.parametrize(("name", "tensor"), list(strange_tensors()))
def test_layouts(name, tensor):
    mask = tensor.detach().ne(0) | (torch.rand(tensor.shape) < 0.05)
    entry = Packer().pack(tensor, mask)
    back = unpack(entry)
    assert_same(back, tensor.detach().resolve_neg())
    assert unpack_mask(entry).equal(mask)
    if name in ("transposed", "channels last", "permuted"):
        assert back.stride() == tensor.stride(), "it lies in memory as it did"


def test_memory_order():
    x = torch.empty(2, 3, 4, 5)
    assert memory_order(x) == [0, 1, 2, 3]
    assert memory_order(x.permute(2, 0, 3, 1)) == [1, 3, 0, 2]
    assert memory_order(x[:, ::2]) == [0, 1, 2, 3], "it has holes: row-major"


def test_active_zeros_are_kept_with_a_mask_and_only_then():
    weight, mask = sparse(40, 40), torch.rand(40, 40) < 0.3
    weight.masked_fill_(~mask, 0.0)
    entry = Packer().pack(weight, mask)
    assert entry["mask"] == "places"
    assert len(entry["values"]) == mask.sum() > weight.count_nonzero()
    assert len(Packer().pack(weight)["values"]) == weight.count_nonzero()


@pytest.mark.parametrize("stray", [-0.0, 1.0, float("nan")])
def test_what_is_outside_the_mask_is_kept_too(stray):
    mask = torch.rand(40, 40) < 0.3
    mask[3, 4] = False
    weight = torch.randn(40, 40).masked_fill_(~mask, 0.0)
    weight[3, 4] = stray
    entry = Packer().pack(weight, mask)
    assert_same(unpack(entry), weight)
    assert unpack_mask(entry).equal(mask)


def test_state_is_stored_on_the_places_of_its_weight():
    packer = Packer()
    mask = torch.rand(64, 64) < 0.1
    other_mask = torch.rand(64, 64) < 0.1
    weight, other = (torch.randn(64, 64).masked_fill(~m, 0.0) for m in (mask, other_mask))
    moment = (weight * weight).masked_fill(torch.rand(64, 64) < 0.3, 0.0)  # zeros of its own
    entries = [packer.pack(t, m) for t, m in ((weight, mask), (other, other_mask), (moment, None))]
    assert entries[2]["places"] is entries[0]["places"]
    assert entries[2]["places"] is not entries[1]["places"]
    assert_same(unpack(entries[2]), moment)
    few = moment * (torch.rand(64, 64) < 0.02)  # cheaper alone
    assert packer.pack(few)["places"] is not entries[0]["places"]
    wide = packer.pack(weight.double())
    assert wide["places"] is entries[0]["places"]
    assert_same(unpack(wide), weight.double())


def test_tied_tensors_are_one_entry():
    packer, weight = Packer(), sparse(64, 64)
    assert packer.pack(weight) is packer.pack(weight.detach())
    assert packer.pack(weight.t()) is not packer.pack(weight)
    assert_same(unpack(packer.pack(weight.t())), weight.t())


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "meta"),
        (nn.parameter.UninitializedParameter(), "UninitializedParameter"),
    ],
)
def test_what_has_no_dense_numbers_is_refused(tensor, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Packer().pack(tensor)


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(4, 3, dtype=torch.bool)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match="a mask is bool and has the shape of its tensor"):
        Packer().pack(torch.ones(3, 4), mask)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"values": torch.ones(2)}, "places and 2 values"),
        ({"values": torch.ones(3, dtype=torch.float16)}, "holds torch.float16"),
        ({"places": torch.ones(4, dtype=torch.uint8)}, "4 bytes of bits for 1600 weights"),
        ({"encoding": "gaps", "places": torch.full((9000,), 200, dtype=torch.uint8)}, "gaps reach to place"),
        ({"encoding": "runs"}, "encoding 'runs' is not known"),
        ({"order": [0, 0]}, r"in order \[0, 0\]"),
        ({"places": torch.ones(200)}, "not bytes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, words):
    entry = Packer().pack(sparse(40, 40, density=0.3))
    with pytest.raises(ValueError, match=words):
        unpack({**entry, **parts})


# checkpoints


def lightning_checkpoint(masks):
    layers = nn.Sequential(OrderedDict((name, nn.Linear(64, 64)) for name in ("one", "two")))
    for name, mask in masks.items():
        layers.get_parameter(name).data.masked_fill_(~mask, 0.0)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3, betas=(0.8, 0.9))
    for name, parameter in layers.named_parameters():
        grad = torch.randn_like(parameter)
        parameter.grad = grad.masked_fill(~masks[name], 0.0) if name in masks else grad
    optimizer.step()
    saved = {name: {"shape": list(m.shape), "bits": bits.pack(m)} for name, m in masks.items()}
    return {
        "epoch": 3,
        "state_dict": layers.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"RigLCallback": {"masks": saved}},
        "hyper_parameters": {"rate": 0.1, "sizes": (1, 2), "none": None},
    }


def two_masks(density=0.1):
    return {f"{name}.weight": torch.rand(64, 64) < density for name in ("one", "two")}


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


def through_a_file(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
def test_a_checkpoint_comes_back_exactly_and_is_read_safely(density):
    masks = two_masks(density)
    checkpoint = lightning_checkpoint(masks)
    before, size = through_a_file(checkpoint)
    read, packed_size = through_a_file(pack_checkpoint(checkpoint, masks))
    assert is_entry(read["state_dict"]["one.weight"])
    assert is_entry(read["optimizer_states"][0]["state"][0]["exp_avg"])
    back = unpack_checkpoint(read)
    assert_same_tree(back, before)
    assert_same_tree(checkpoint, before)  # what was given is as it was
    assert back["state_dict"]._metadata == checkpoint["state_dict"]._metadata
    assert packed_size < size * (density + 0.1) + 8000
    nn.Sequential(OrderedDict((n, nn.Linear(64, 64)) for n in ("one", "two"))).load_state_dict(
        back["state_dict"]
    )


def test_places_are_stored_once_in_a_checkpoint():
    masks = two_masks()
    packed = pack_checkpoint(lightning_checkpoint(masks), masks)
    state = packed["optimizer_states"][0]["state"]
    places = packed["state_dict"]["one.weight"]["places"]
    assert state[0]["exp_avg"]["places"] is places
    assert state[0]["exp_avg_sq"]["places"] is places
    assert packed["callbacks"]["RigLCallback"]["masks"]["one.weight"]["bits"] is places
    read, _ = through_a_file(packed)
    first = read["state_dict"]["one.weight"]["places"]
    assert read["optimizer_states"][0]["state"][0]["exp_avg"]["places"].data_ptr() == first.data_ptr()


def test_tied_weights_stay_tied_in_a_checkpoint():
    weight = sparse(64, 64)
    packed, _ = through_a_file(
        pack_checkpoint({"state_dict": {"a": weight, "b": weight}}, {"a": weight != 0})
    )
    back = unpack_checkpoint(packed)["state_dict"]
    assert back["a"] is back["b"]
    assert_same(back["a"], weight)


def test_names_with_the_prefix_of_a_wrapper():
    weight = sparse(64, 64)
    packed = pack_checkpoint({"state_dict": {"net._orig_mod.weight": weight}}, {"net.weight": weight != 0})
    assert packed["state_dict"]["net._orig_mod.weight"]["mask"] == "places"


def test_a_plain_checkpoint_is_left_as_it_is():
    checkpoint = lightning_checkpoint(two_masks())
    assert_same_tree(unpack_checkpoint(checkpoint), checkpoint)


def test_bad_checkpoints_and_masks():
    masks = two_masks()
    checkpoint = lightning_checkpoint(masks)
    packed = pack_checkpoint(checkpoint, masks)
    with pytest.raises(ValueError, match="packed already"):
        pack_checkpoint(packed, masks)
    with pytest.raises(ValueError, match="format 3 and this version reads 1 and 2; update"):
        unpack_checkpoint({**packed, "lightning_rigl_packing": 3})
    with pytest.raises(ValueError, match=r"three\.weight: there is a mask of that name and no tensor"):
        pack_checkpoint(checkpoint, {"three.weight": masks["one.weight"]})
    with pytest.raises(ValueError, match=r"one.weight: the mask is \(8, 8\) and the tensor \(64, 64\)"):
        pack_checkpoint(checkpoint, {"one.weight": torch.ones(8, 8, dtype=torch.bool)})
    packed["state_dict"]["one.weight"]["values"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"damaged: state_dict/one\.weight: .* places and 3 values"):
        unpack_checkpoint({**packed, "lightning_rigl_packing": 1})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("part", ["values", "places"])
def test_a_flipped_bit_of_a_packed_tensor_is_found_and_named(part, dtype):
    weight, mask = sparse(64, 64, dtype=dtype), torch.rand(64, 64) < 0.1
    packed, _ = through_a_file(pack_checkpoint({"state_dict": {"one.weight": weight}}, {"one.weight": mask}))
    code = packed["state_dict"]["one.weight"][part].view(torch.uint8)
    code[len(code) // 2] ^= 1
    with pytest.raises(ValueError, match=r"damaged: state_dict/one\.weight does not have the checksum"):
        unpack_checkpoint(packed)


@pytest.mark.parametrize("change", [{"shape": [32, 128]}, {"order": [1, 0]}, {"crc32": 0}, {"mask": "none"}])
def test_another_description_of_a_packed_tensor_is_found(change):
    masks = two_masks()
    packed = pack_checkpoint(lightning_checkpoint(masks), masks)
    packed["state_dict"]["two.weight"].update(change)
    with pytest.raises(ValueError, match=r"state_dict/two\.weight does not have the checksum"):
        unpack_checkpoint(packed)


def test_state_and_latent_weights_have_a_checksum():
    masks = two_masks()
    checkpoint = lightning_checkpoint(masks)
    checkpoint["state_dict"]["one.weight"].view(-1)[:9] = 1.0  # latent ones, too: the mask has its own places
    packed, _ = through_a_file(pack_checkpoint(checkpoint, masks))
    packed["optimizer_states"][0]["state"][0]["exp_avg"]["values"][0] += 1
    with pytest.raises(ValueError, match="damaged: optimizer_states/0/state/0/exp_avg does not have"):
        unpack_checkpoint(packed)


def test_a_checkpoint_of_the_first_format_is_read():
    masks = two_masks()
    checkpoint = lightning_checkpoint(masks)
    packed = pack_checkpoint(checkpoint, masks)
    for entry in (*packed["state_dict"].values(), *packed["optimizer_states"][0]["state"][0].values()):
        if is_entry(entry):
            del entry["crc32"]
    packed["lightning_rigl_packing"] = 1
    assert_same_tree(unpack_checkpoint(packed), checkpoint)


def test_numpy_and_torch_agree_on_the_bits():
    mask = torch.rand(13, 7) < 0.5
    assert bits.pack(mask).numpy().tolist() == np.packbits(mask.numpy().ravel(), bitorder="little").tolist()
