"""How large a checkpoint of a sparse ResNet-50 is, and how long it takes to save and to load, side by side.

    python benchmarks/checkpoint_size.py      about a minute on two cores; writes results/checkpoint_size.json

Every format holds the same numbers exactly; the formats are timed in turns, and a ratio is the median of the
ratios of the rounds. Files stay in the page cache, as torch.save leaves them: no format waits for the disk.
What is read is compared bit by bit with what was written before anything is timed. "Less work" is the ratio
of processor times, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_rigl import Sparsifier, UpdateSchedule
from lightning_rigl.export.checkpoints import pack_checkpoint, unpack_checkpoint
from lightning_rigl.export.files import load, load_masks, save
from machine import describe, store

# the examples are not installed with the package
sys.path.append(str(Path(__file__).parent.parent / "examples"))

from paper_networks import ResNet50

Format = tuple[str, Callable[[Path], object], Callable[[Path], Any]]  # name, save, load
FORMATS = {
    "torch.save": "torch.save of the dense state dict",
    "torch.save, masks": "with a bool mask for each sparse layer, as most implementations keep them",
    "safetensors": "safetensors.torch.save_file of the dense state dict",
    "export.save": "export.save, zeros found",
    "export.save, masks": "export.save with masks",
    "torch.save, Adam": "torch.save of a checkpoint with Adam's two moments",
    "packed, Adam": "torch.save of pack_checkpoint of it, packing included",
    "export.save, Adam": "export.save with masks and optimizer",
}
BASE = {name: "torch.save, Adam" if name.endswith("Adam") else "torch.save" for name in FORMATS}


def trained(sparsity: float, distribution: str) -> tuple[nn.Module, dict[str, Tensor], torch.optim.Optimizer]:
    """A sparse ResNet-50 after two steps of Adam with gradients of its active weights."""
    model = ResNet50()
    ordinary = UpdateSchedule(every=1_000_000, end=2_000_000)
    sparsifier = Sparsifier(model, sparsity, distribution=distribution, schedule=ordinary, seed=0)
    sparsifier.start()
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            grad = torch.randn_like(parameter)
            parameter.grad = grad.masked_fill_(~masks[name], 0.0) if name in masks else grad
        optimizer.step()
    return model, masks, optimizer


def formats(model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[Format]:
    """How each of them is saved and loaded."""
    state = model.state_dict()

    def checkpoint() -> dict[str, Any]:
        return {"state_dict": state, "optimizer_states": [optimizer.state_dict()]}

    def read(path: Path) -> Any:
        return torch.load(path, weights_only=True)

    def read_both(path: Path) -> Any:
        return load(path), load_masks(path)

    ways: dict[str, tuple[Callable[[Path], object], Callable[[Path], Any]]] = {
        "torch.save": (lambda path: torch.save(state, path), read),
        "torch.save, masks": (lambda path: torch.save((state, masks), path), read),
        "safetensors": (lambda path: save_file(state, path), load_file),
        "export.save": (lambda path: save(state, path), load),
        "export.save, masks": (lambda path: save(state, path, masks), load),
        "torch.save, Adam": (lambda path: torch.save(checkpoint(), path), read),
        "packed, Adam": (
            lambda path: torch.save(pack_checkpoint(checkpoint(), masks), path),
            lambda path: unpack_checkpoint(read(path)),
        ),
        "export.save, Adam": (
            lambda path: save(state, path, masks, optimizer),
            lambda path: load(path, optimizer=optimizer),  # which copies the state once more
        ),
    }
    return [(name, *ways[name]) for name in FORMATS]


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bits."""
    if isinstance(one, Tensor):
        bits = one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        return one.dtype == other.dtype and one.shape == other.shape and bits[0].equal(bits[1])
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check(ways: list[Format], folder: Path, masks: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write and read each once; raise unless the same comes back."""
    read = {}
    for name, write, way in ways:
        write(folder / name)
        read[name] = way(folder / name)
    for name in FORMATS:
        if name == "packed, Adam":
            right = same(read[name], read["torch.save, Adam"])
        elif name not in ("torch.save, masks", "torch.save, Adam"):
            right = same(read[name], state)
        else:
            continue
        if not right:
            raise AssertionError(f"{name} does not give back what was saved")
    if not same(load_masks(folder / "export.save, masks"), masks):
        raise AssertionError("the masks do not come back")


def measure(sparsity: float, distribution: str, rounds: int) -> dict[str, Any]:
    """Bytes and milliseconds of every format for one network."""
    model, masks, optimizer = trained(sparsity, distribution)
    ways = formats(model, masks, optimizer)
    saving: dict[str, list[float]] = {name: [] for name in FORMATS}
    loading: dict[str, list[float]] = {name: [] for name in FORMATS}
    working: dict[str, list[float]] = {name: [] for name in FORMATS}  # processor time of saving
    with tempfile.TemporaryDirectory() as folder:
        check(ways, Path(folder), masks, model.state_dict())
        for _ in range(rounds):
            for name, write, read in ways:
                path = Path(folder) / name
                path.unlink()
                start, work = time.perf_counter(), time.process_time()
                write(path)
                working[name].append(time.process_time() - work)
                middle = time.perf_counter()
                read(path)
                saving[name].append(middle - start)
                loading[name].append(time.perf_counter() - middle)
        size = {name: (Path(folder) / name).stat().st_size for name in FORMATS}

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return round(statistics.median(b / t for b, t in zip(times[BASE[name]], times[name], strict=True)), 2)

    return {
        name: {
            "bytes": size[name],
            "times_smaller": round(size[BASE[name]] / size[name], 2),
            "save_ms": round(1e3 * statistics.median(saving[name]), 1),
            "save_times_faster": ratio(saving, name),
            "save_processor_ms": round(1e3 * statistics.median(working[name]), 1),
            "save_times_less_work": ratio(working, name),
            "load_ms": round(1e3 * statistics.median(loading[name]), 1),
            "load_times_faster": ratio(loading, name),
            "base": BASE[name],
        }
        for name in FORMATS
    }


def table(title: str, rows: dict[str, Any]) -> str:
    """One network's formats; sizes and times against torch.save of the same content."""
    head = ("", "MB", "smaller", "save ms", "faster", "less work", "load ms", "faster")
    lines = [
        (
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['times_smaller']:.1f}x",
            f"{row['save_ms']:.0f}",
            f"{row['save_times_faster']:.2f}x",
            f"{row['save_times_less_work']:.2f}x",
            f"{row['load_ms']:.0f}",
            f"{row['load_times_faster']:.2f}x",
        )
        for name, row in rows.items()
    ]
    text = [f"{name:20}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in (head, *lines)]
    return "\n".join([title, *text])


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--distribution", nargs="+", default=["uniform", "erk"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"command": "python benchmarks/checkpoint_size.py", "machine": describe()}
    result["formats"] = FORMATS
    result["rounds"] = arguments.rounds
    for distribution in arguments.distribution:
        for sparsity in arguments.sparsity:
            key = f"resnet50_{distribution}_{sparsity}"
            result[key] = measure(sparsity, distribution, arguments.rounds)
            print(table(f"ResNet-50 at {sparsity:.0%} sparsity, {distribution}", result[key]), end="\n\n")
    print(f"written to {store('checkpoint_size', result)}")


if __name__ == "__main__":
    main()
