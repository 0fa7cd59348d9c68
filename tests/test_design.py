"""One RigL update, from the hook to the new mask, takes as many lines to read as docs/design.md states."""

import inspect
import re
from pathlib import Path

from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.methods.base import Connections
from lightning_rigl.methods.rigl import RigL
from lightning_rigl.model import initial_masks, new_mask, optimizer_state
from lightning_rigl.model.sparsifier import Sparsifier
from lightning_rigl.topology import selection
from lightning_rigl.topology.patterns import Unstructured
from lightning_rigl.topology.schedules import Timetable

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"
PATH = [
    RigLCallback.on_before_optimizer_step,
    RigLCallback._count_step,
    Sparsifier.before_step,
    Sparsifier._names_in,
    optimizer_state.gradients_are_finite,
    Timetable,
    Sparsifier.update,
    Sparsifier.check_zeros,
    Sparsifier.mask_weights,
    Sparsifier._replace_mask,
    initial_masks.private_generator,
    new_mask,
    Connections,
    RigL,
    Unstructured,
    selection,
    optimizer_state.reset,
    optimizer_state._elementwise,
    optimizer_state._fresh,
]


def test_the_stated_number_of_lines_is_the_true_one():
    lines = sum(len(inspect.getsource(part).splitlines()) for part in PATH)
    stated = int(re.search(r"(\d+) lines to read", DESIGN.read_text()).group(1))
    assert stated == lines
    assert lines < 500
