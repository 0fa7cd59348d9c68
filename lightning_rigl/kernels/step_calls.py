"""Optimizer steps over active connections only, by the native kernels: work and state as large as the mask.

The arithmetic is that of torch's dense step of one tensor (``foreach=False, fused=False``), rounding by
rounding. SGD gives the same bits. So do Adam's two averages; its weights do wherever torch's own square root
is correctly rounded, which MKL's misses by one unit in the last place now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_rigl.kernels.library import Library, threads
from lightning_rigl.kernels.topology_calls import wide


def sgd(
    library: Library,
    weight: Tensor,
    grad: Tensor,
    velocity: Tensor | None,
    structure: tuple[Tensor, Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    values: Tensor | None = None,
) -> None:
    r"""One step of SGD, in place: v <- momentum v + (1 - dampening) (g + decay w), w <- w - lr v.

    Args:
        library: the kernels.
        weight: dense, float32, contiguous, on the CPU; inactive places are neither read nor written.
        grad: of the shape of ``weight`` and contiguous, or of shape (connections,) in row-major order.
        velocity: of shape (connections,), changed in place; None without momentum.
        structure: ``starts`` and ``columns`` as `topology_calls.csr` gives them for the layer's mask.
        lr: learning rate.
        momentum: as of ``torch.optim.SGD``; 0 for none.
        dampening: as there.
        weight_decay: as there, added to the gradient.
        nesterov: as there.
        maximize: as there.
        first: this is the first step, which sets ``velocity`` to the gradient whatever it held.
        values: of shape (connections,): receives the active weights after the step, ready for a product.

    Raises:
        TypeError: a tensor is not float32 on the CPU, or the structure is not as `csr` makes it.
        ValueError: shapes do not fit, a tensor is not contiguous, or momentum and ``velocity`` do not go
            together.

    Reference:
        Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013.
    """
    if (velocity is None) != (momentum == 0):
        raise ValueError(
            f"momentum is {momentum} and velocity {'missing' if velocity is None else 'given'}; "
            "a velocity goes with a momentum other than 0, and only with it"
        )
    starts, columns = structure
    _check(weight, grad, structure, {"velocity": velocity, "values": values})
    library(
        "lr_sgd", "ppippppinnffffiiii", weight.data_ptr(), grad.data_ptr(), _compact(weight, grad),
        _pointer(velocity), _pointer(values), starts.data_ptr(), columns.data_ptr(), wide(structure),
        *_sizes(weight), lr, momentum, 1 - dampening, weight_decay, nesterov, maximize, first, threads(),
    )  # fmt: skip
    increment_version(weight)  # so that autograd knows of the change


def adam(
    library: Library,
    weight: Tensor,
    grad: Tensor,
    averages: tuple[Tensor, Tensor],
    structure: tuple[Tensor, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    values: Tensor | None = None,
) -> None:
    r"""One step of AdamW, or of Adam with L2, in place.

    m <- m + (1 - beta1) (g - m), s <- beta2 s + (1 - beta2) g^2,
    w <- w - lr / (1 - beta1^t) * m / (sqrt(s) / sqrt(1 - beta2^t) + eps).

    Args:
        library: the kernels.
        weight: as in `sgd`.
        grad: as in `sgd`.
        averages: ``exp_avg`` and ``exp_avg_sq``, each of shape (connections,), changed in place.
        structure: as in `sgd`.
        step: t, the number of this step, from 1.
        lr: learning rate.
        betas: as of ``torch.optim.AdamW``, each from 0 to below 1.
        eps: as there.
        weight_decay: as there.
        decoupled: the decay shrinks the weights first (AdamW); else it is added to the gradient (Adam).
        maximize: as there.
        values: as in `sgd`.

    Raises:
        TypeError: a tensor is not float32 on the CPU, or the structure is not as `csr` makes it.
        ValueError: shapes do not fit, a tensor is not contiguous, or ``step`` or ``betas`` are out of range.

    Reference:
        Loshchilov, Hutter, *Decoupled weight decay regularization*, ICLR 2019, arXiv:1711.05101.
    """
    beta1, beta2 = betas
    if step < 1 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"step {step}, betas {betas}: steps count from 1, betas lie from 0 to below 1")
    starts, columns = structure
    _check(weight, grad, structure, {"exp_avg": averages[0], "exp_avg_sq": averages[1], "values": values})
    shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    library(
        "lr_adam", "ppipppppinnffffffffii", weight.data_ptr(), grad.data_ptr(), _compact(weight, grad),
        averages[0].data_ptr(), averages[1].data_ptr(), _pointer(values), starts.data_ptr(),
        columns.data_ptr(), wide(structure), *_sizes(weight), lr / (1 - beta1**step), 1 - beta1, beta2,
        1 - beta2, (1 - beta2**step) ** 0.5, eps, shrink, decay, maximize, threads(),
    )  # fmt: skip
    increment_version(weight)


def _check(
    weight: Tensor, grad: Tensor, structure: tuple[Tensor, Tensor], compact: dict[str, Tensor | None]
) -> None:
    """Everything that a pointer could not tell, before anything is changed."""
    starts, columns = structure
    wide(structure)
    if weight.ndim < 2 or len(starts) != len(weight) + 1:
        raise ValueError(
            f"a structure of {len(starts) - 1} rows does not fit a weight of shape {tuple(weight.shape)}; "
            "its first dimension is the rows, and it needs two or more"
        )
    compact = {"grad": grad, **compact} if _compact(weight, grad) else compact
    for name, tensor in {"weight": weight, "grad": grad, **compact}.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}; the native steps need float32 on the CPU"
            )
        shape = columns.shape if name in compact else weight.shape
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be "
                f"contiguous of shape {tuple(shape)}"
            )


def _compact(weight: Tensor, grad: Tensor) -> bool:
    return grad.ndim == 1 < weight.ndim


def _sizes(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight[0].numel() if len(weight) else 0


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
