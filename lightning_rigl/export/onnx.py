"""A compacted model as an ONNX file, for runtimes without PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_rigl.export.sparse_layers import SparseProduct

_NEEDED = ("onnx", "onnxscript")
_LARGEST = 2**31 - 2**24  # bytes of a protobuf file


def to_onnx(model: nn.Module, example: Any, path: str | Path, *, dynamic_batch: bool = True) -> Path:
    """Write a model as one ONNX file.

    ONNX has no useful sparse product: what makes the file small and fast is that dead units are gone, so give
    the result of `compact`.

    Args:
        model: a module, as `compact` returns it; it is exported in evaluation mode and not changed.
        example: the input: a tensor, or a tuple of positional arguments, on the model's device.
        path: the file to write. Weights of two gigabytes and more go into a second file beside it.
        dynamic_batch: whether the first dimension of every input may be of any size.

    Returns:
        The path of the file.

    Raises:
        TypeError: no module.
        FileNotFoundError: the folder does not exist.
        ModuleNotFoundError: a package that torch needs for ONNX is missing.
        RuntimeError: torch is older than 2.6.
        ValueError: the model has layers of `sparse`; or torch cannot export it, the message is its own.

    Example:
        >>> small = compact(model, images)  # doctest: +SKIP
        >>> to_onnx(small, images, "small.onnx")  # doctest: +SKIP
        PosixPath('small.onnx')
    """
    path = Path(path)
    _check(model, path)
    args = example if isinstance(example, tuple) else (example,)
    shapes: Any = None
    if dynamic_batch:
        args = tree_map(_two_samples, args)  # a size of 1 would be taken for a constant
        shapes = tree_map(_free_batch, args)
    twin = copy.deepcopy(model).eval()
    size = sum(t.numel() * t.element_size() for t in (*twin.parameters(), *twin.buffers()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside of torch's exporter
            torch.onnx.export(
                twin,
                args,
                path,
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=size > _LARGEST,
                verbose=False,
            )
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be written as ONNX: {type(error).__name__}: {error}. If the "
            "forward pass needs the batch size of the example, give dynamic_batch=False"
        ) from error
    return path


def _check(model: nn.Module, path: Path) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_onnx: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, SparseProduct):
            raise ValueError(
                f"to_onnx: {name or 'the model'} is a {type(module).__name__} of export.sparse, and ONNX "
                "has no such product; write the result of export.compact, or the dense model"
            )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"to_onnx: the folder {path.parent} does not exist; make it first")
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        raise RuntimeError(f"to_onnx needs torch 2.6 or newer, this is {torch.__version__}")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"to_onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}", name=missing[0]
        )


def _two_samples(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == 1 else leaf


def _free_batch(leaf: Any) -> Any:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.dim() else None
