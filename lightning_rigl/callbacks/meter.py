"""What a step costs: known, measured on a copy without values, or else by watching the real one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer

from lightning_rigl.callbacks.batch_form import signature
from lightning_rigl.callbacks.dry_run import measure_copy
from lightning_rigl.flops.costs import Convention, CostTable
from lightning_rigl.flops.formulas import SampleCost, sample_cost, sample_cost_of
from lightning_rigl.flops.tracer import Tracer
from lightning_rigl.model import sharding
from lightning_rigl.model.layers import named_parameters
from lightning_rigl.model.sparsifier import Sparsifier

WATCHED = 16  # batches of manual optimization: a second optimizer may make a step in every fifth only
MANY = 100


class Meter:
    """Knows what a sample costs, for each kind of batch that it has met.

    Attributes:
        counts: active connections, by the name of a parameter and by the key of a slice.
        inference: the cost of the first validation batch, in evaluation mode; None if unknown.
    """

    def __init__(self, convention: Convention) -> None:
        self.convention: Convention = convention
        self.counts: dict[str, int] = {}
        self.inference: CostTable | None = None
        self._known: dict[str, CostTable] = {}  # by what a batch looks like
        self._kind = ""  # of the last training batch
        self._form = ""  # of the present one
        self._parameters: list[Tensor] = []
        self._trained: tuple[bool, ...] = ()  # which of them are
        self._stepped: list[int] = []  # the optimizers that made a step in this batch, by their index
        self._watched: dict[str, int] = {}  # batches that were watched in manual optimization, by their form
        self._fleeting: set[str] = set()  # forms whose cost depends on values
        self._hooks = ExitStack()  # removes those of the optimizers
        self._costs: dict[str, SampleCost] = {}  # at these counts
        self._version: object = None  # of what was counted
        self._validated = False
        self._tracer: Tracer | None = None
        self._watching = ExitStack()  # holds the tracer while a real step is watched
        self._empty = 0  # measurements that saw no product
        self._said: set[str] = set()

    @property
    def table(self) -> CostTable | None:
        """The cost of the last training batch; None before the first."""
        return self._known.get(self._kind)

    @property
    def cost(self) -> SampleCost:
        """What the last training batch costs at the counts, or each of its samples; 0 before the first."""
        if self._kind not in self._costs:
            table = self.table or CostTable(())
            self._costs[self._kind] = sample_cost(table, self.counts, self.convention)
        return self._costs[self._kind]

    def cost_of(self, names: Collection[str]) -> SampleCost:
        """The part that the products of these parameters have in it."""
        return sample_cost_of(self.table or CostTable(()), self.counts, names)

    def fits(self, module: LightningModule) -> bool:
        """Whether what is known is of a model with these layers; shards are flat and not compared."""
        shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(module).items()}
        return all(
            layer.name in shapes and (shapes[layer.name] == layer.shape or len(shapes[layer.name]) == 1)
            for layer in (self.table.layers if self.table else ())
        )

    def __getstate__(self) -> dict[str, Any]:
        """What was measured; what is being watched stays here."""
        here: dict[str, Any] = {"_watching": ExitStack(), "_hooks": ExitStack(), "_parameters": []}
        return {**vars(self), **here, "_tracer": None}

    def state_dict(self) -> dict[str, Any]:
        """What was measured last and counted, in plain types."""
        table = self.table.state_dict() if self.table else None
        return {"kind": self._kind, "table": table, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know again what `state_dict` holds, in a new meter."""
        self._kind, self.counts = state["kind"], dict(state["counts"])
        if state["table"]:
            self._known[self._kind] = CostTable.from_state_dict(state["table"])

    def open(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Know the cost of this batch: remembered, measured on a copy, or soon watched."""
        if batch_idx == 0 or not self._parameters:
            self._parameters = list(module.parameters())
        self._look()
        self._stepped = []
        form = self._form_of(batch)
        self._form = form if batch is not None else ""  # the step draws its own batch
        if batch is None and self.table:
            return
        if not module.automatic_optimization:
            self._attach(trainer)
            if self._watched.get(form, 0) < WATCHED:
                self._watch(module)
        elif form in self._known and form not in self._fleeting:
            self._kind = form
        elif not self._accept(measure_copy(trainer, module, batch, batch_idx, self.samples(batch)), form):
            self._watch(module)

    def _attach(self, trainer: Trainer) -> None:
        """In manual optimization, see which optimizers make a step: a batch costs what they cost."""
        for index, optimizer in enumerate(trainer.optimizers):
            begin = optimizer.register_step_pre_hook(partial(self._begin_step, index))
            end = optimizer.register_step_post_hook(lambda *_: self.own_products(False))
            self._hooks.callback(begin.remove)
            self._hooks.callback(end.remove)

    def _begin_step(self, index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        self._stepped.append(index)
        self.own_products(not any(callable(value) for value in (*args[1:], *kwargs.values())))

    def own_products(self, optimizes: bool) -> None:
        """Whether what is computed from here on is the optimizer's own; a closure comes before that."""
        if self._tracer:
            self._tracer.optimizes = optimizes

    def pause(self) -> None:
        """Watch no longer; what was seen is taken later."""
        self._watching.close()

    def stop(self) -> Tracer | None:
        """Watch no longer; returns what was seen. The optimizers are as they were."""
        self._watching.close()
        self._hooks.close()
        tracer, self._tracer = self._tracer, None
        return tracer

    def close(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> int:
        """The step of this batch is over; take what was watched. Returns its number of samples."""
        tracer, samples = self.stop(), self.samples(batch)
        if self._look() and tracer is None and module.automatic_optimization:  # the module froze a parameter
            self.open(trainer, module, batch, batch_idx)
            self.stop()  # where it takes a real step to see, the next one is watched
        form = self._form or self._form_of(batch)
        kind = f"{form} {self._stepped}" if self._stepped else form
        if tracer is not None and samples:
            if tracer.varies and module.automatic_optimization:
                self._fleeting.add(form)
            self._empty += not self._accept(tracer.table(samples), kind)
            self._watched[form] = self._watched.get(form, 0) + 1
        elif form in self._watched and kind not in self._known:
            self._say(
                f"for the first time optimizers {self._stepped} made the steps of a batch; it counts as the "
                "batch before, and the next ones are watched"
            )
            self._watched[form] = 0
        self._kind = kind if kind in self._known else self._kind
        return samples

    def count(self, sparsifier: Sparsifier | None) -> None:
        """Take the active connections as they are now, of slices too where a product uses one."""
        counts = dict(sparsifier.counts) if sparsifier else {}
        tables = (*self._known.values(), *((self.inference,) if self.inference else ()))
        version = dict(counts), sparsifier.updates if sparsifier else 0, len(tables)
        if version == self._version:
            return
        self._version = version
        for part in (layer for table in tables for layer in table.layers if layer.stop is not None):
            layer = sparsifier.layers.get(part.name) if sparsifier else None
            if layer is not None and part.key not in counts and not sharding.is_sharded(layer.mask):
                counts[part.key] = int(layer.mask.view(-1)[part.start : part.stop].count_nonzero())
        if counts != self.counts:
            self.counts, self._costs = counts, {}
        self._warn(sparsifier.layers if sparsifier else ())

    def open_inference(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure ``validation_step`` once, on a copy in evaluation mode, or else soon watch the real one."""
        if not self._validated:
            self._validated, samples = True, self.samples(batch)
            self.inference = measure_copy(trainer, module, batch, batch_idx, samples, "validation_step")
            if self.inference is None:
                self._watch(module, inference=True)

    def close_inference(self, batch: Any) -> None:
        """The validation of this batch is over; take what was watched."""
        tracer, samples = self.stop(), self.samples(batch)
        if tracer is not None and samples:
            self.inference = tracer.table(samples)

    def _watch(self, module: LightningModule, inference: bool = False) -> None:
        self._watching.close()
        tracer = Tracer(named_parameters(module), module.buffers(), inference)
        self._tracer = self._watching.enter_context(tracer)

    def samples(self, batch: Any) -> int:
        """The size of a batch, as Lightning sees it."""
        if batch is None:
            return 0
        try:
            return extract_batch_size(batch)
        except (MisconfigurationException, RecursionError) as error:
            self._say(f"a batch of type {type(batch).__name__} counts as one sample: {error}")
            return 1

    def _look(self) -> bool:
        """Note which parameters are trained; whether that has changed."""
        before, self._trained = self._trained, tuple(p.requires_grad for p in self._parameters)
        return self._trained != before

    def _form_of(self, batch: Any) -> str:
        """What the cost of a batch depends on: its form and which parameters are trained."""
        return f"{int(''.join('01'[trained] for trained in (True, *self._trained)), 2):x} {signature(batch)}"

    def _warn(self, sparse: Collection[str]) -> None:
        """Say what the measurement did not see, of operators and of sparse layers."""
        if self.table is None:
            return
        if unknown := self.table.unknown:
            self._say(
                f"not counted are the operators {_few(unknown)}; a product with their result counts as one "
                "without a parameter, at full density"
            )
        if unseen := sorted({*sparse} - {layer.name for layer in self.table.layers}):
            self._say(
                f"no product with {_few(unseen)} was seen (FSDP hides them): what these layers cost is "
                "counted at full density, or they took no part"
            )

    def _say(self, message: str) -> None:
        """A warning, once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"FLOPsCallback: {message}")

    def _accept(self, table: CostTable | None, kind: str) -> bool:
        """Take a measurement, unless it saw no product: such a batch is no example of those to come."""
        if table is None or (self._empty < 10 and not table.layers and not table.other):
            return False
        if not table.layers and not table.other:
            self._say("the first batches ran no product; the FLOPs of this model are 0")
        if self._known.get(kind, table) != table and kind not in self._fleeting:
            self._say(
                "batches of the same form, with the same optimizers, have other costs; each counts as it was "
                f"watched, those after the first {WATCHED} as the last one watched"
            )
        self._known[kind], self._kind = table, kind
        self._costs.pop(kind, None)
        if len(self._known) == MANY:
            self._say(
                f"{MANY} kinds of batches so far, each was measured; padding to fewer sizes spares that"
            )
        return True


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
