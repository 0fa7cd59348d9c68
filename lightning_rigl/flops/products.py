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


def _recurrent(x: Tensor, weights: Sequence[Tensor], *state: Tensor | None) -> list[Product]:
    # A fused recurrent layer: at each step each matrix meets one vector. Its backward kernel computes the
    # gradients of the inputs whether they are needed or not.
    steps = x.numel() // max(x.shape[-1], 1)
    together = x, *weights, *(s for s in state if s is not None)
    matrices = [w for w in weights if w.dim() == 2]
    return [Product((together, (w,)), steps * w.numel(), steps * w.shape[0]) for w in matrices]


# By name: not every version of torch has every operator.
PRODUCTS: dict[str, Callable[[Args, Tensor], list[Product]]] = {
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot"), _matmul),
    **dict.fromkeys(("aten.matmul", "aten.linear", "aten._scaled_mm", "aten._grouped_mm"), _matmul),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _addmm),
    "aten.addbmm": _addbmm,
    **dict.fromkeys(("aten.convolution", "aten._convolution", "aten.convolution_overrideable"), _convolution),
    "aten._trilinear": _trilinear,
    "aten.mkldnn_rnn_layer": lambda args, out: _recurrent(args[0], args[1:5], *args[5:7]),
    "aten._cudnn_rnn": lambda args, out: _recurrent(args[0], args[1], *args[4:6]),
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
}
# What stays the same weight: in another type or order, a part of it, normalized.
COPIES = {
    *("aten._to_copy", "aten.clone", "aten.repeat", "aten.lift_fresh", "aten.native_dropout"),
    *("aten.index", "aten.index_select", "aten.gather"),
    *("aten.flip", "aten.roll", "aten.tril", "aten.triu", "aten.constant_pad_nd"),
    *("aten._weight_norm_interface", "aten._weight_norm"),
    *("aten.native_batch_norm", "aten.cudnn_batch_norm"),
}
JOINS = {"aten.cat", "aten.stack"}
UNCOUNTED = {
    *("aten.embedding", "aten.embedding_bag", "aten._embedding_bag"),
    *("aten.native_layer_norm", "aten._fused_rms_norm"),
    *("aten.sum", "aten.mean", "aten.norm", "aten.linalg_vector_norm"),
    *("aten.var", "aten.std", "aten.var_mean", "aten.std_mean"),
    *("aten.max", "aten.min", "aten.amax", "aten.amin", "aten.all", "aten.any"),
    *(f"aten.{fill}_like" for fill in ("empty", "zeros", "ones", "full", "rand", "randn", "bernoulli")),
    *(f"aten.new_{fill}" for fill in ("empty", "zeros", "ones", "full", "empty_strided")),
}
