"""Runs that belong together: trained side by side, stored one by one, resumed, and shown as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from machine import describe

Case = tuple[str, float, int]  # method, sparsity, seed


@dataclass(frozen=True)
class Study:
    """A benchmark of many runs.

    Args:
        name: of the files ``<name>.json`` and ``<name>.md``.
        title: of the table.
        cases: (method, sparsity, seed) of each run.
        train: a case and a folder of data -> what it came to, by name; ``score`` is what the table shows.
        settings: what two sets of runs must share to be compared.
        score: what it is, and in what unit.
        published: (method, sparsity) -> the value in a paper, shown beside ours.
        source: of these values, and how that protocol differs.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    train: Callable[[Case, Path], dict[str, float]]
    settings: Mapping[str, Any]
    score: str
    published: Mapping[tuple[str, float], float]
    source: str = ""


def run(study: Study, data_dir: Path, output: Path, workers: int, command: str) -> None:
    """Train what is not stored yet; each run is a process with one thread.

    Raises:
        ValueError: the stored runs were made with other settings or on another machine.
    """
    path = output / f"{study.name}.json"
    machine = {**describe(), "threads": 1}
    content: dict[str, Any] = {
        "command": command,
        "machine": machine,
        "settings": dict(study.settings),
        "runs": _earlier(path, machine, study.settings),
    }
    done = {(r["method"], r["sparsity"], r["seed"]) for r in content["runs"]}
    left = [case for case in study.cases if case not in done]
    output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(study.train, case, data_dir): case for case in left}
        for future in as_completed(futures):
            method, sparsity, seed = futures[future]
            content["runs"].append({"method": method, "sparsity": sparsity, "seed": seed, **future.result()})
            _write(output, study, content)
            latest = content["runs"][-1]
            print(
                f"{method} {sparsity:g} seed {seed}: {latest['score']:.4g}, {len(content['runs'])} runs",
                flush=True,
            )


def markdown(study: Study, content: Mapping[str, Any]) -> str:
    """The results as a page: a row for each method, a column for each sparsity."""
    runs = content["runs"]
    sparsities = sorted({case[1] for case in study.cases})
    lines = [f"# {study.title}", "", f"{study.score}: mean ± standard deviation (seeds).", ""]
    shown = [f"{sparsity:g}" for sparsity in sparsities]
    costs = [f"training FLOPs at {s}" for s in shown]
    lines += [f"| method | {' | '.join([*shown, *costs])} |", "|---" * (1 + 2 * len(shown)) + "|"]
    for method in dict.fromkeys(case[0] for case in study.cases):
        mine = {s: [r for r in runs if (r["method"], r["sparsity"]) == (method, s)] for s in sparsities}
        cells = [_cell(mine[s], study.published.get((method, s))) for s in sparsities]
        ratios = [
            f"{statistics.mean(r['train_ratio'] for r in mine[s]):.4f}" if mine[s] else "" for s in sparsities
        ]
        lines.append(f"| {method} | {' | '.join([*cells, *ratios])} |")
    machine = content["machine"]
    lines += [
        "",
        *([f"In brackets: {study.source}", ""] if study.source else []),
        f"Command: `{content['command']}`. Machine: {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, lightning {machine['lightning']}. FLOPs: share of dense training.",
        "",
        *(f"- {name}: {value}" for name, value in content["settings"].items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[Mapping[str, Any]], published: float | None) -> str:
    scores = [run["score"] for run in runs]
    if not scores:
        return ""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread} ({len(scores)})" + (
        f" [{published:g}]" if published else ""
    )


def _earlier(path: Path, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for part, own in (("settings", dict(settings)), ("machine", dict(machine))):
        if earlier[part] != own:
            raise ValueError(
                f"{path} holds runs with other {part}, {earlier[part]}, now {own}; move it away, or write "
                "elsewhere with --output"
            )
    return list(earlier["runs"])


def _write(folder: Path, study: Study, content: dict[str, Any]) -> None:
    """Replace both files, in a way that an interruption leaves the old ones."""
    order = {case: place for place, case in enumerate(study.cases)}
    content["runs"].sort(key=lambda r: order.get((r["method"], r["sparsity"], r["seed"]), len(order)))
    for suffix, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", markdown(study, content))):
        draft = folder / f"{study.name}.{suffix}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / f"{study.name}.{suffix}")
