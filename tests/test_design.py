"""One RigL update, from the hook to the new mask, takes as many lines to read as docs/design.md states."""

import inspect
import re
from pathlib import Path

from lightning_rigl.callbacks.clock import Clock
from lightning_rigl.callbacks.empty_step import EmptyStep
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.methods.base import Connections, Method, Moment
from lightning_rigl.methods.rigl import RigL
from lightning_rigl.model import moments, new_masks, optimizer_state, sharding, sparse_layer, sparsifier
from lightning_rigl.model.sparse_layer import SparseLayer, SparseLayers
from lightning_rigl.model.sparsifier import Sparsifier
from lightning_rigl.topology import selection
from lightning_rigl.topology.patterns import Unstructured
from lightning_rigl.topology.schedules import Timetable

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"
PATH = [
    RigLCallback.on_before_optimizer_step,
    Clock.step,
    Clock.time,
    Clock.tick,
    Clock.settle,
    Clock.is_over,
    EmptyStep.scaler,
    EmptyStep.leave_unclipped,
    Sparsifier.before_step,
    Sparsifier._due,
    sparse_layer.last_update,
    SparseLayers.of,
    Sparsifier._gradients_serve,
    optimizer_state.gradients_are_finite,
    sharding.everywhere,
    Timetable,
    Sparsifier.update,
    Sparsifier.check_zeros,
    SparseLayers.has_strays,
    SparseLayer.has_strays,
    moments.moment_of,
    moments._group,
    Sparsifier.count_update,
    SparseLayer.connections,
    SparseLayer.replace,
    SparseLayer.mask_weight,
    sparsifier._drop_gradients,
    SparseLayers.check_agreement,
    sharding.check_same,
    sparse_layer.private_generator,
    new_masks,
    Connections,
    Moment,
    Method.turnover,
    RigL,
    Unstructured,
    selection,
    optimizer_state.reset,
    optimizer_state.elementwise,
    optimizer_state._fresh,
]


def test_the_names_in_the_table_exist():
    section = DESIGN.read_text().split("## One RigL update")[1].split("## Decisions")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
    files = {
        name: (DESIGN.parent.parent / "lightning_rigl" / name).read_text()
        for name in re.findall(r"`([a-z_/]+\.py)`", table)
    }
    for row in table.splitlines():
        where = row.split("|")[1]
        text = "".join(files[name] for name in re.findall(r"`([a-z_/]+\.py)`", where))
        for name in re.findall(r"`([A-Za-z_.]+)`", re.sub(r"`[a-z_/]+\.py`", "", where)):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", text), name


def test_the_stated_number_of_lines_is_the_true_one():
    lines = sum(len(inspect.getsource(part).splitlines()) for part in PATH)
    stated = int(re.search(r"(\d+) lines to read", DESIGN.read_text()).group(1))
    assert stated == lines
    assert lines < 600
