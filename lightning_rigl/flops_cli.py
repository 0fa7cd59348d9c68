"""The command ``lightning-rigl flops``: what a sparse training will cost, without training."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lightning_rigl.flops.costs import Convention
from lightning_rigl.flops.measure import measurement
from lightning_rigl.flops.plan import FLOPsPlan
from lightning_rigl.flops.planning import plan_flops, sparsity_for_ratio
from lightning_rigl.methods.base import Method
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.schedules import UpdateSchedule

DESCRIPTION = "What a sparse training will cost, layer by layer and in all, without training."
REPEATABLE = re.compile(r"^(--(?:input|include|exclude))(?==|$)")  # ``--input`` adds, as ``--input+`` does


def main(args: Sequence[str]) -> None:
    """Print the plan; leave with a message where the options make none.

    Args:
        args: what stands behind ``lightning-rigl flops``.
    """
    arguments = parser()
    parsed = arguments.parse_args([REPEATABLE.sub(r"\1+", arg) for arg in args])
    # the first name from jsonargparse 4.49 on, the second before
    instantiate = getattr(arguments, "instantiate", None) or arguments.instantiate_classes
    try:
        made = plan(instantiate(parsed))
    except (ValueError, TypeError) as error:
        sys.exit(f"lightning-rigl flops: {error}")
    shown = {"table": made.__str__, "csv": made.to_csv, "json": made.to_json}[parsed.format]()
    print(shown.removesuffix("\n"))


def parser() -> LightningArgumentParser:
    """The options, with the names that the callbacks' parameters have."""
    options = LightningArgumentParser(prog="lightning-rigl flops", description=DESCRIPTION)
    add = options.add_argument
    add("--config", action="config", help="a YAML file with these options")
    add("--model", type=str, required=True, help="pkg.module:factory, called without arguments")
    add(
        "--input",
        type=list[str],
        required=True,
        help="shape of an input, the batch first, and its dtype if not float32: 1,3,224,224 or 8,512:int64; "
        "repeatable",
    )
    add("--sparsity", type=float | None, help="fraction of zeros over the sparse layers, in [0, 1) (0.9)")
    add(
        "--target-ratio",
        type=float | None,
        help="instead of a sparsity: the share of the dense model's FLOPs, in (0, 1]",
    )
    add(
        "--target",
        type=Literal["inference", "training"] | None,
        help="which FLOPs the target ratio is of (inference)",
    )
    add(
        "--distribution",
        type=Distribution | str,
        default="erk",
        help="how the connections are shared between layers: erk, er, uniform, or a Distribution",
    )
    add(
        "--method",
        type=Method | str,
        default="rigl",
        help="which method trains: rigl, set, static, or a Method",
    )
    add("--every", type=int, default=100, help="steps between topology updates")
    add(
        "--end",
        type=int | float,
        default=0.75,
        help="no update is due at this step or later; below 1 a fraction of training",
    )
    add(
        "--steps",
        type=int | None,
        help="length of training in optimizer steps; of the dense one for --budget",
    )
    add(
        "--budget",
        type=str | None,
        help="show the training that this pays for: FLOPs, or a multiple of the dense training's, as 1.0x",
    )
    add(
        "--include",
        type=list[str] | None,
        help="regular expression of layers to make sparse, in place of the default; repeatable",
    )
    add("--exclude", type=list[str] | None, help="regular expression of layers that stay dense; repeatable")
    add("--convention", type=Convention, default="2mac", help="how FLOPs are counted")
    add(
        "--format",
        type=Literal["table", "csv", "json"],
        default="table",
        help="csv: the table of layers only",
    )
    return options


def plan(options: Any) -> FLOPsPlan:
    """The plan that the options ask for.

    Raises:
        ValueError: options that do not go together, or that `plan_flops` refuses.
    """
    inputs = [read_input(text) for text in options.input]
    known = measurement(load_model(options.model), *inputs, include=options.include, exclude=options.exclude)
    chosen = {
        "distribution": options.distribution,
        "method": options.method,
        "schedule": UpdateSchedule(every=options.every, end=options.end),
        "steps": options.steps,
        "convention": options.convention,
    }
    sparsity = 0.9 if options.sparsity is None else options.sparsity
    if options.target and options.target_ratio is None:
        raise ValueError("--target says which FLOPs --target-ratio is of; give that as well")
    if options.target_ratio is not None:
        if options.sparsity is not None:
            raise ValueError("--target-ratio finds the sparsity; leave --sparsity out")
        sparsity = sparsity_for_ratio(
            known, ratio=options.target_ratio, of=options.target or "inference", **chosen
        )
    made = plan_flops(known, sparsity=sparsity, **chosen)
    return made if options.budget is None else made.within(options.budget)


def load_model(path: str) -> nn.Module:
    """Import ``pkg.module:factory`` and call it.

    Raises:
        ValueError: no such module or factory, one that needs arguments, fails or makes no module.
    """
    place, _, name = path.partition(":")
    try:
        factory = attrgetter(name)(importlib.import_module(place))
        inspect.signature(factory).bind()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model={path}: expected pkg.module:factory, a callable without arguments: {error}"
        ) from error
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"--model={path}: {type(error).__name__} when called: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model={path}: made a {type(model).__name__}, expected a torch.nn.Module")
    return model


def read_input(text: str) -> Tensor:
    """``1,3,224,224`` or ``8,512:int64`` -> a tensor without values.

    Raises:
        ValueError: no such shape, or no such dtype.

    Example:
        >>> read_input("8,512:int64")
        tensor(..., device='meta', size=(8, 512), dtype=torch.int64)
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    sizes = r"[1-9]\d*(,[1-9]\d*)" + ("*" if name else "+")  # one size alone is a forgotten batch
    if re.fullmatch(sizes, shape) is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"--input={text}: expected sizes, the batch first, and a dtype of torch if not float32, as "
            "1,3,224,224 or 8,512:int64"
        )
    return torch.empty([int(size) for size in shape.split(",")], dtype=dtype, device="meta")
