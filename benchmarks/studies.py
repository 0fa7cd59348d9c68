"""Runs that belong together: trained side by side, stored one by one, resumed, and shown as a table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from lightning_rigl import FLOPsCallback
from machine import describe

Case = tuple[str, float, int]  # method, sparsity, seed
DENSE = 0.0  # the sparsity of a run that stands beside all sparsities


@dataclass(frozen=True)
class Column:
    """What a table shows beside the score: a result by name, its title, and its decimals."""

    key: str
    title: str
    decimals: int


@dataclass(frozen=True)
class Study:
    """A benchmark of many runs.

    Args:
        name: of the files ``<name>.json`` and ``<name>.md``.
        title: of the table.
        cases: (method, sparsity, seed) of each run; one at sparsity 0 stands beside all sparsities.
        train: a case and a folder of data -> what it came to, by name; ``score`` is what the table shows.
        settings: what two sets of runs must share to be compared.
        score: what it is, and in what unit.
        published: (method, sparsity) -> the value in a paper, shown beside ours.
        source: of these values, and how that protocol differs.
        look: opens the data in a folder, so that a wrong folder shows before the first run.
        decimals: of the score.
        columns: what the table shows beside the score.
        shown: the scores that the picture shows, others lie outside; None: all.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    train: Callable[[Case, Path], dict[str, float]]
    settings: Mapping[str, Any]
    score: str
    published: Mapping[tuple[str, float], float]
    source: str = ""
    look: Callable[[Path], object] = Path.stat
    decimals: int = 2
    columns: tuple[Column, ...] = (Column("train_ratio", "training FLOPs", 4),)
    shown: tuple[float, float] | None = None


def run(study: Study, data_dir: Path, output: Path, workers: int, command: str) -> None:
    """Train what is not stored yet; each run is a process with one thread. Where all is, only show it.

    Raises:
        ValueError: the stored runs were made with other settings.
    """
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    machine = {**describe(), "threads": 1, **gpu}
    content: dict[str, Any] = {
        "command": command,
        "machines": [],
        "settings": dict(study.settings),
        "runs": [],
        **_earlier(output / f"{study.name}.json", study.settings),
    }
    if machine not in content["machines"]:
        content["machines"].append(machine)
    place = content["machines"].index(machine)
    done = {(r["method"], r["sparsity"], r["seed"]) for r in content["runs"]}
    left = [case for case in study.cases if case not in done]
    output.mkdir(parents=True, exist_ok=True)
    if not left:
        _write(output, study, content)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(study.train, case, data_dir): case for case in left}
        for future in as_completed(futures):
            method, sparsity, seed = futures[future]
            case = {"method": method, "sparsity": sparsity, "seed": seed}
            run = {**case, "machine": place, **future.result()}
            content["runs"].append(run)
            _write(output, study, content)
            score, number = run["score"], len(content["runs"])
            print(f"{method} {sparsity:g} seed {seed}: {score:.4g}, {number} runs", flush=True)


def new_trainer(
    callbacks: list[Callback],
    epochs: int | None = None,
    steps: int = -1,
    clip: float | None = None,
    accelerator: str = "cpu",
) -> Trainer:
    """A trainer that writes nothing, for a number of epochs or of optimizer steps."""
    return Trainer(
        max_epochs=-1 if epochs is None else epochs,
        max_steps=steps,
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=clip,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def outcome(
    score: float, module: LightningModule, flops: FLOPsCallback, dense: float, start: float
) -> dict[str, float]:
    """What a run came to. ``dense``: FLOPs of the dense training; ``start``: when it began."""
    report = flops.report()
    return {
        "score": score,
        "active": sum(int(p.count_nonzero()) for p in module.parameters() if p.dim() > 1),
        "forward_ratio": report.forward_ratio,
        "train_flops": report.train,
        "train_ratio": report.train / dense,
        "seconds": round(time.perf_counter() - start, 1),
    }


def markdown(study: Study, content: Mapping[str, Any]) -> str:
    """The results as a page: a row for each method, a column for each sparsity."""
    sparsities = _sparsities(study)
    lines = [f"# {study.title}", "", f"{study.score}: mean ± standard deviation (seeds).", ""]
    titles = [f"{s:g}" for s in sparsities] + [
        f"{c.title} at {s:g}" for c in study.columns for s in sparsities
    ]
    lines += [f"| method | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for method in dict.fromkeys(case[0] for case in study.cases):
        mine = {s: _runs(content, method, s) for s in sparsities}
        cells = [_cell(study, method, s, mine[s]) for s in sparsities]
        cells += [_mean(mine[s], column) for column in study.columns for s in sparsities]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    machines = [_words(m) for i, m in enumerate(content["machines"]) if _ran_on(content, i)]
    lines += [
        "",
        *([f"In brackets: {study.source}", ""] if study.source else []),
        f"Command: `{content['command']}`. Machine: {'; '.join(machines)}. FLOPs: share of dense training.",
        "",
        *(f"- {name}: {value}" for name, value in content["settings"].items()),
    ]
    return "\n".join(lines) + "\n"


def picture(study: Study, content: Mapping[str, Any]) -> Figure:
    """The score against the sparsity: a line for each method, the dense model dashed; bars are deviations."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes, sparsities = figure.subplots(), _sparsities(study)
    for place, method in enumerate(dict.fromkeys(case[0] for case in study.cases)):
        scores = [[r["score"] for r in _runs(content, method, s)] for s in sparsities]
        points = [(i, statistics.mean(own), _deviation(own)) for i, own in enumerate(scores) if own]
        if points and method == "dense":
            axes.axhline(
                statistics.mean(y for _, y, _ in points), color="black", linestyle="--", label=method
            )
        elif points:
            x, y, spread = zip(*points, strict=True)
            style = {"color": f"C{place % 10}", "marker": "osv^D"[place // 10 % 5]}
            axes.errorbar(x, y, spread, label=method, capsize=2, linewidth=1, markersize=4, **style)
    axes.set_xticks(range(len(sparsities)), [f"{s:g}" for s in sparsities])
    axes.set_xlabel("sparsity")
    axes.set_ylabel(study.score.split(",")[0])
    axes.set_title(study.title, fontsize="medium")
    if study.shown:
        axes.set_ylim(*study.shown)
    if content["runs"]:
        figure.legend(loc="outside right upper", fontsize="x-small", ncols=1 + len(axes.containers) // 14)
    return figure


def _ran_on(content: Mapping[str, Any], place: int) -> int:
    return sum(run["machine"] == place for run in content["runs"])


def _words(machine: Mapping[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    versions = f"torch {machine['torch']}, lightning {machine['lightning']}"
    return f"{machine['cpu']}, {machine['cores']} cores, {gpu}{versions}"


def _sparsities(study: Study) -> list[float]:
    return sorted({case[1] for case in study.cases} - {DENSE})


def _runs(content: Mapping[str, Any], method: str, sparsity: float) -> list[Mapping[str, Any]]:
    return [r for r in content["runs"] if r["method"] == method and r["sparsity"] in (sparsity, DENSE)]


def _deviation(scores: Sequence[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def _mean(runs: Sequence[Mapping[str, Any]], column: Column) -> str:
    return f"{statistics.mean(r[column.key] for r in runs):.{column.decimals}f}" if runs else ""


def _cell(study: Study, method: str, sparsity: float, runs: Sequence[Mapping[str, Any]]) -> str:
    published = study.published.get((method, sparsity), study.published.get((method, DENSE)))
    cell, scores = "", [run["score"] for run in runs]
    if scores:
        spread = f" ± {_deviation(scores):.{study.decimals}f}" if len(scores) > 1 else ""
        cell = f"{statistics.mean(scores):.{study.decimals}f}{spread} ({len(scores)})"
    return f"{cell} [{published:g}]" if cell and published else cell


def _earlier(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Machines and runs that are stored; scores differ by rounding between machines, settings may not."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["settings"] != dict(settings):
        raise ValueError(
            f"{path} holds runs with other settings, {earlier['settings']}, now {dict(settings)}; move it "
            "away, or write elsewhere with --output"
        )
    return {"machines": earlier["machines"], "runs": earlier["runs"]}


def _write(folder: Path, study: Study, content: dict[str, Any]) -> None:
    """Replace all files, in a way that an interruption leaves the old ones."""
    order = {case: place for place, case in enumerate(study.cases)}
    content["runs"].sort(key=lambda r: order.get((r["method"], r["sparsity"], r["seed"]), len(order)))
    for suffix, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", markdown(study, content))):
        draft = folder / f"{study.name}.{suffix}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / f"{study.name}.{suffix}")
    draft = folder / f"{study.name}.png.draft"
    picture(study, content).savefig(draft, dpi=110, format="png")
    draft.replace(folder / f"{study.name}.png")
