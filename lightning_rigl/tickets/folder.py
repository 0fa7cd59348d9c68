"""What a run of lottery tickets keeps on disk. Every file is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_rigl.topology.tables import Table

FORMAT = 1


@dataclass(frozen=True)
class Ticket:
    """A round that is finished.

    Args:
        round: 0 is the dense training.
        active: connections of the sparse layers that were trained.
        size: all connections of these layers.
        steps: optimizer steps of this round.
        metrics: ``trainer.callback_metrics`` at its end.
        checkpoint: an ordinary checkpoint of its end; ``load_masks`` and ``RigLCallback(init=...)`` read it.
    """

    round: int
    active: int
    size: int
    steps: int
    metrics: dict[str, float]
    checkpoint: Path

    @property
    def density(self) -> float:
        """Active connections over all connections."""
        return self.active / self.size


class Folder:
    """The names of the files, and what the small ones say.

    ``tickets.json`` holds the settings, ``first.ckpt`` and ``rewind.ckpt`` the training before its first
    step and after step k. A round has a folder with the ``masks.pt`` it trains, ``last.ckpt`` while it runs,
    and in the end ``end.ckpt`` and ``end.json``; the last of these says that the round is finished.

    Raises:
        ValueError: the path is a file; later, one of the small files is not what was written there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder={str(self.path)!r} is a file; give the name of a folder")
        self.settings = self.path / "tickets.json"
        self.first = self.path / "first.ckpt"
        self.rewind = self.path / "rewind.ckpt"

    def file(self, index: int, name: str) -> Path:
        """A file of one round."""
        return self.path / f"round-{index:02d}" / name

    def tickets(self) -> list[Ticket]:
        """The rounds that are finished."""
        found: list[Ticket] = []
        while (end := self.file(len(found), "end.json")).exists():
            result = read_json(end, ("active", "size", "steps", "metrics"))
            found.append(Ticket(len(found), **result, checkpoint=end.with_suffix(".ckpt")))
        return found

    def read_settings(self) -> dict[str, Any]:
        """What the folder was made with; empty if there is nothing yet."""
        if not self.settings.exists():
            return {}
        return read_json(self.settings, ("format", "step", "parameters"))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError unless what is kept here was made with these settings."""
        known = self.read_settings()
        for name, own in {"format": FORMAT, **settings}.items():
            if known and known.get(name) != own:
                raise ValueError(
                    f"folder={str(self.path)!r} holds tickets of {name}={known.get(name)!r}, and this call "
                    f"has {name}={own!r}; go on with the same {name}, or take another folder"
                )

    def check_parameters(self, shapes: Mapping[str, Sequence[int] | None], complete: bool = True) -> None:
        """Raise ValueError unless the model of this folder has the same parameters.

        Args:
            shapes: of the parameters of a model, by name; None where it is not known yet.
            complete: whether these are all; if not, others of the folder may still come.
        """
        known = self.read_settings().get("parameters")
        if known is None:
            return
        another = f"folder={str(self.path)!r} holds tickets of another model"
        for name, shape in shapes.items():
            if shape is not None and known.get(name) != list(shape):
                was = f"has it as {known[name]}" if name in known else "has none of that name"
                raise ValueError(
                    f"{another}: {name} is {list(shape)} now, and the model of the folder {was}; take "
                    "another folder"
                )
        for name in known if complete else ():
            if name not in shapes:
                raise ValueError(f"{another}, which has {name}; this one has not; take another folder")


def read_json(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        ValueError: it is not that, or has none of one of these names.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        content, why = None, str(error)
    else:
        whole = isinstance(content, dict)
        missing = [name for name in names if name not in content] if whole else []
        why = f"{missing[0]} is missing" if missing else "" if whole else "no names and values"
    if why:
        raise ValueError(
            f"{str(path)!r} is not what lottery tickets write there ({why}); put that file back, or take "
            "another folder"
        )
    return dict(content)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write it beside, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, path)


def write_tensors(content: Mapping[str, Any], path: Path) -> None:
    """Write it beside, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    torch.save(content, beside)
    os.replace(beside, path)


def tickets_table(tickets: Sequence[Ticket]) -> Table:
    """Round, connections, density, steps and metrics; the last row adds up the steps.

    Example:
        >>> print(tickets_table([Ticket(0, 100, 100, 50, {"acc": 0.9}, Path()),
        ...                      Ticket(1, 80, 100, 40, {"acc": 0.925}, Path())]))
        lottery tickets
        round      active  density  steps     acc
        0      100 of 100   1.0000     50  0.9000
        1       80 of 100   0.8000     40  0.9250
        -----------------------------------------
        all                            90
    """
    names = list(dict.fromkeys(name for ticket in tickets for name in ticket.metrics))

    def metric(ticket: Ticket, name: str) -> str:
        return f"{ticket.metrics[name]:.4f}" if name in ticket.metrics else ""

    rows = [
        (
            str(ticket.round),
            f"{ticket.active:,} of {ticket.size:,}",
            f"{ticket.density:.4f}",
            f"{ticket.steps:,}",
            *(metric(ticket, name) for name in names),
        )
        for ticket in tickets
    ]
    total = ("all", "", "", f"{sum(ticket.steps for ticket in tickets):,}", *("" for _ in names))
    return Table("lottery tickets", ("round", "active", "density", "steps", *names), tuple(rows), total)
