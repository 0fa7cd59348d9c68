"""Two pictures of sparse training: where the connections go, and what accuracy costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def input_connections(before: Tensor, after: Tensor, mean_image: Tensor) -> Figure:
    """Draw how many connections leave each input pixel, before and after training, beside the mean image.

    Args:
        before: mask of the first layer, of shape (out, in), True = active.
        after: the same layer's mask after training.
        mean_image: of shape (height, width) with height x width = in.

    Returns:
        A figure with three panels; the first two share their colours.

    Raises:
        ValueError: masks of different shapes, or an image with another number of pixels.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> before, after = torch.ones(4, 6).bool(), torch.eye(4, 6).bool()
        >>> figure = input_connections(before, after, torch.rand(2, 3))
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['before training', 'after training', 'mean image']

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, figure 7.
    """
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(
            "the masks must be those of one linear layer, both of shape (out, in), got "
            f"{tuple(before.shape)} before and {tuple(after.shape)} after"
        )
    if mean_image.ndim != 2 or mean_image.numel() != before.shape[1]:
        raise ValueError(
            f"mean_image has shape {tuple(mean_image.shape)}, but the layer has {before.shape[1]} inputs; "
            "give an image of shape (height, width) with one pixel per input"
        )
    counts = [mask.detach().cpu().sum(0).view(mean_image.shape) for mask in (before, after)]
    most = max(int(count.max()) for count in counts)
    figure = _new_figure(10.0, 3.2)
    left, middle, right = figure.subplots(1, 3)
    for axes, count, when in ((left, counts[0], "before"), (middle, counts[1], "after")):
        drawn = axes.imshow(count.numpy(), cmap="viridis", vmin=0, vmax=max(most, 1))
        axes.set_title(f"{when} training")
    figure.colorbar(drawn, ax=[left, middle], label="connections per input pixel")
    brightness = right.imshow(mean_image.detach().cpu().numpy(), cmap="gray")
    right.set_title("mean image")
    figure.colorbar(brightness, ax=right, label="mean pixel value")
    for axes in (left, middle, right):
        axes.set_xlabel("pixel column")
    left.set_ylabel("pixel row")
    return figure


def accuracy_against_flops(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the test accuracy of each system against the FLOPs that its training took.

    Args:
        rows: one per system and sparsity. Keys: ``model`` (one panel each), ``system`` (one colour each),
            ``sparsity`` (one marker each), ``accuracy`` (percent), ``spread`` (half the length of the error
            bar, NaN for none), and ``train`` (FLOPs of one training run, multiply-add = 2).

    Returns:
        A figure with one panel per model; points of one system are joined by a line.

    Raises:
        ValueError: no rows, or a row without one of the keys.
        ImportError: matplotlib is not installed.

    Example:
        >>> row = {"model": "mlp", "system": "rigl", "sparsity": 0.9, "accuracy": 97.5, "spread": 0.3}
        >>> figure = accuracy_against_flops([{**row, "train": 4e9}])
        >>> figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()
        ('log', 'test accuracy (%)')
    """
    _check_rows(rows)
    models, systems = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "system"))
    markers = dict(zip(sorted({row["sparsity"] for row in rows}), cycle("*osD^vPX"), strict=False))
    figure = _new_figure(4.6 * len(models) + 1.6, 4.2)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for i, system in enumerate(systems):
            points = [row for row in rows if (row["model"], row["system"]) == (model, system)]
            _draw_system(axes, system, points, f"C{i}", markers)
        costs = [row["train"] for row in rows if row["model"] == model]
        decades = floor(log10(min(costs) / 1.1)), ceil(log10(max(costs) * 1.1))
        axes.set(title=model, xscale="log", xlim=(10.0 ** decades[0], 10.0 ** decades[1]))
        axes.xaxis.set_minor_formatter("")  # whole decades are labelled; more labels would overlap
        axes.set_xlabel("training FLOPs (multiply-add = 2)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    for sparsity, marker in markers.items():
        if sparsity:
            label = f"at {100 * sparsity:.4g} % sparsity"
            panels[0].plot([], [], color="grey", linestyle="", marker=marker, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _draw_system(
    axes: Axes,
    system: str,
    points: Sequence[Mapping[str, Any]],
    colour: str,
    markers: Mapping[float, str],
) -> None:
    """One line, and on it a marker with its error bar for each sparsity."""
    points = sorted(points, key=lambda row: row["train"])
    xs, ys = ([row[key] for row in points] for key in ("train", "accuracy"))
    axes.plot(xs, ys, color=colour, linewidth=1, label=system)
    for x, y, row in zip(xs, ys, points, strict=True):
        marker = markers[row["sparsity"]]
        axes.errorbar(x, y, yerr=row["spread"], color=colour, marker=marker, markersize=5, capsize=3)


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("there are no rows to draw")
    keys = ("model", "system", "sparsity", "accuracy", "spread", "train")
    for number, row in enumerate(rows):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"row {number} lacks {', '.join(missing)}; each row needs {', '.join(keys)}")


def _new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window, so that it needs no display and leaves pyplot's state alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lightning-rigl[plot]'") from error
    return Figure(figsize=(width, height), layout="compressed")
