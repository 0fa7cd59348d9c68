"""Which operators of PyTorch are products, of what, and how large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Args = Sequence[Any]


class Product(NamedTuple):
    """One contraction of two operands, each a tensor, or those that a kernel makes it of inside."""

    operands: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    macs: int
    outputs: int


def _matmul(args: Args, out: Tensor) -> list[Product]:
    a, b = args[:2]
    return [Product(((a,), (b,)), out.numel() * a.shape[-1], out.numel())]


def _addmm(args: Args, out: Tensor) -> list[Product]:
    return _matmul(args[1:], out)


def _addbmm(args: Args, out: Tensor) -> list[Product]:
    a, b = args[1:3]
    return [Product(((a,), (b,)), a.numel() * b.shape[-1], out.numel())]


def _convolution(args: Args, out: Tensor) -> list[Product]:
    # Each output element, or each input element of a transposed convolution, meets one filter.
    x, weight, transposed = args[0], args[1], args[6]
    points = x if transposed else out
    return [Product(((x,), (weight,)), points.numel() * math.prod(weight.shape[1:]), out.numel())]


def _attention(args: Args, out: Tensor) -> list[Product]:
    # (..., queries, width) x (..., keys, width), then the scores x (..., keys, width of the values); causal
    # masks do not count.
    query, key, value = args[:3]
    scores = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
    first = Product(((query,), (key,)), scores * query.shape[-1], 0)
    return [first, Product(((query, key), (value,)), scores * value.shape[-1], 0)]


def _trilinear(args: Args, out: Tensor) -> list[Product]:
    # torch.nn.Bilinear: (batch, in1) x (out, in1, in2), then x (batch, in2).
    first, weight, second = args[:3]
    weight_macs = out.numel() // max(weight.shape[0], 1) * weight.numel()
    rest = out.numel() * weight.shape[-1]
    inner = Product(((first,), (weight,)), weight_macs, out.numel())
    return [inner, Product(((first, weight), (second,)), rest, 0)]


def _recurrent(x: Tensor, weights: Sequence[Tensor], hx: Tensor, projected: bool) -> list[Product]:
    # A fused recurrent layer: at each step each matrix meets one vector. It counts as its steps one by one:
    # the first layer's matrix of the input meets x, that of the state meets the given one first.
    vectors = x.numel() // max(x.shape[-1], 1)
    first = hx.shape[-2]  # vectors of the first step
    matrices = [w for w in weights if w.dim() == 2]
    products: list[Product] = []
    for place, w in enumerate(matrices):
        of_the_state = place % (3 if projected else 2) == 1
        given, n = (hx, first) if of_the_state else (x, vectors if w.shape[1] == x.shape[-1] else 0)
        for operand, count in (((given,), n), ((x, hx, *weights), vectors - n)):
            products += [Product((operand, (w,)), count * w.numel(), count * w.shape[0])] if count else []
    return products


def _connections(args: Args, out: Tensor) -> list[Product]:
    # An exported layer: the values that are left of its weight, each once for each vector of the input.
    x, values, inputs = args[0], args[1], args[5]
    return [Product(((x,), (values,)), x.numel() // max(inputs, 1) * values.numel(), out.numel())]


# Of layers that compute sparsely while they are trained: input, weight and bias, then where the zeros are.
SPARSE = {"lightning_rigl.linear_forward", "lightning_rigl.sparse_linear"}
EXPORTED = {f"lightning_rigl.{name}{end}" for name in ("linear", "conv1x1") for end in ("", "_with_gradient")}
# By name: not every version of torch has every operator.
PRODUCTS: dict[str, Callable[[Args, Tensor], list[Product]]] = {
    **dict.fromkeys(("aten.addmm_", "aten.baddbmm_", "aten.addmv_"), _addmm),
    "aten.addbmm_": _addbmm,
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot"), _matmul),
    **dict.fromkeys(("aten.matmul", "aten.linear", "aten._scaled_mm", "aten._grouped_mm"), _matmul),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _addmm),
    "aten.addbmm": _addbmm,
    **dict.fromkeys(("aten.convolution", "aten._convolution", "aten.convolution_overrideable"), _convolution),
    "aten._trilinear": _trilinear,
    "aten.mkldnn_rnn_layer": lambda args, out: _recurrent(args[0], args[1:5], args[5], False),
    "aten._cudnn_rnn": lambda args, out: _recurrent(args[0], args[1], args[4], args[8] > 0),
    **dict.fromkeys(SPARSE, _matmul),
    **dict.fromkeys(EXPORTED, _connections),
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
}
# What stays the same weight: in another order or type, a part of it, normalized.
REORDERS = {f"aten.{name}" for name in ("index", "index_select", "gather", "flip", "roll")}
COPIES = {
    *REORDERS,
    *("aten._to_copy", "aten.clone", "aten.repeat", "aten.lift_fresh", "aten.native_dropout"),
    *("aten.tril", "aten.triu", "aten.constant_pad_nd"),
    *("aten._weight_norm_interface", "aten._weight_norm"),
    *("aten.native_batch_norm", "aten.cudnn_batch_norm"),
}
JOINS = {"aten.cat", "aten.stack"}
# What leaves a weight no zeros: its mean taken away, a function that is not 0 at 0; of sums, another term.
FILLS = {"aten.native_batch_norm", "aten.cudnn_batch_norm"}
FILLS |= {f"aten.{name}" for name in ("exp", "sigmoid", "softplus", "cos", "cosh", "erfc")}
PRODUCTS_ADDED = {f"aten.{name}" for name in ("addmm", "baddbmm", "addbmm", "addmv")}
SUMS = {f"aten.{name}" for name in ("add", "sub", "rsub", "lerp", "addcmul", "addcdiv")} | PRODUCTS_ADDED
SUMMED = {"aten.sum", "aten.mean"}  # after a multiplication: a contraction
UNCOUNTED = {
    *("aten.embedding", "aten.embedding_bag", "aten._embedding_bag"),
    *("aten.native_layer_norm", "aten._fused_rms_norm"),
    *("aten.sum", "aten.mean", "aten.norm", "aten.linalg_vector_norm"),
    *("aten.var", "aten.std", "aten.var_mean", "aten.std_mean"),
    *("aten.max", "aten.min", "aten.amax", "aten.amin", "aten.all", "aten.any"),
    *(f"aten.{fill}_like" for fill in ("empty", "zeros", "ones", "full", "rand", "randn", "bernoulli")),
    *(f"aten.new_{fill}" for fill in ("empty", "zeros", "ones", "full", "empty_strided")),
}
