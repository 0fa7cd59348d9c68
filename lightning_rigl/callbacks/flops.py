"""FLOPsCallback: measure the model once, then add up the cost of each step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_rigl.callbacks.rhythm import log_levels, log_step
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.callbacks.twin import measure_copy
from lightning_rigl.flops.formulas import Convention, CostTable, RunCost, check_convention, forward_cost
from lightning_rigl.flops.report import FLOPsReport, ratio, report
from lightning_rigl.flops.tracer import Tracer
from lightning_rigl.model.layers import named_parameters
from lightning_rigl.model.sparsifier import Sparsifier


class FLOPsCallback(Callback):
    """Counts the FLOPs of a model and of its training, sparse or dense.

    The model is measured once, at the first training batch, on a copy without values, or else by watching
    the real step; nothing stays attached to it. From then on a step costs f_S forward and 2 f_S backward per
    sample, at the active connections of a `RigLCallback` in the same trainer, and f_S + f_D backward where
    the method reads the gradient of inactive connections. Without a `RigLCallback` the dense model is
    counted. Evaluation is not part of training and is not counted.

    Logs ``flops/forward`` (per sample), ``flops/train`` (so far) and their ratios to the dense model,
    ``flops/forward_ratio`` and ``flops/train_ratio``, at topology updates, every ``log_every_n_steps`` and at
    epoch ends. In a distributed run each device counts its own samples. Totals continue from fit to fit and
    from a checkpoint; another module starts them anew.

    Args:
        convention: ``2mac`` counts two FLOPs per multiply-add of a weight; ``official`` adds one per output
            element of each layer, as the counter behind the published tables does.

    Raises:
        ValueError: an unknown convention.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.
    """

    def __init__(self, convention: Convention = "2mac") -> None:
        check_convention(convention)
        self.convention: Convention = convention
        self._table: CostTable | None = None
        self._run = RunCost()
        self._counts: dict[str, int] = {}  # active connections while the current batch runs
        self._forward: int | None = None  # f_S at these counts
        self._forward_dense = 0
        self._before = (0, 0)  # optimizer steps and topology updates when the current batch started
        self._tracer: Tracer | None = None
        self._watching = ExitStack()  # holds the tracer while a real step is watched
        self._warned = False  # of a batch whose size is unknown
        self._module: weakref.ref[LightningModule] | None = None  # the one whose training is counted
        self._fitting = False
        self._empty = 0  # measurements that saw no product

    def report(self) -> FLOPsReport:
        """What the model costs now, layer by layer, and what its training has cost so far on this device.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        if self._table is None:
            raise RuntimeError("nothing is measured yet: FLOPs are known after the first training batch")
        return report(self._table, self._counts, self._run.train, self._run.train_dense, self.convention)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew if a fit begins with another module; a checkpoint's totals come later."""
        self._fitting = stage == "fit"
        if self._fitting and self._module is not None and self._module() is not pl_module:
            self._run = RunCost()
            self._set_table(None)
        if self._fitting or self._module is None:
            self._module = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew if the totals belong to another model."""
        if self._table is not None and not _fits(self._table, pl_module):
            rank_zero_warn("FLOPsCallback: these layers are not those counted so far; the totals start anew")
            self._run = RunCost()
            self._set_table(None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the model if it is not yet; remember what holds before the step."""
        sparsifier = _sparsifier(trainer)
        self._before = trainer.global_step, sparsifier.updates if sparsifier else 0
        self._set_counts(sparsifier.counts if sparsifier else {})
        if self._table is None:
            self._accept(measure_copy(trainer, pl_module, batch, batch_idx, self._samples(batch)))
        if self._table is None:
            self._watching.close()
            self._tracer = self._watching.enter_context(Tracer(named_parameters(pl_module)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Only the forward pass is watched; in manual optimization more of them may follow."""
        if pl_module.automatic_optimization:
            self._watching.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the cost of the step."""
        self._watching.close()
        samples = self._samples(batch)
        if self._table is None and self._tracer is not None and samples:
            self._accept(self._tracer.table(samples))
            self._empty += self._table is None
        self._tracer = None
        if self._table is None:
            return
        sparsifier = _sparsifier(trainer)
        steps, updates = self._before
        updated = sparsifier is not None and sparsifier.updates != updates
        self._run = self._run.after(
            samples,
            self._forward_now(self._table),
            self._forward_dense,
            gradient=sparsifier.method.gradient if sparsifier else "never",
            updated=updated,
            stepped=trainer.global_step != steps,
        )
        self._set_counts(sparsifier.counts if sparsifier else {})
        log_step(trainer, pl_module, partial(self._levels, self._table), event=updated)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the totals once more, for loggers and checkpoints that look at epochs."""
        self._watching.close()  # still open if the epoch was cut short in its first batch
        if self._table is not None and not trainer.barebones:
            log_levels(pl_module, self._levels(self._table), on_step=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()

    def state_dict(self) -> dict[str, Any]:
        """The totals and what was measured, in plain types."""
        table = None if self._table is None else self._table.state_dict()
        return {
            "convention": self.convention,
            "run": asdict(self._run),
            "counts": dict(self._counts),
            "table": table,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; one that is validated or tested leaves the totals of a fit alone."""
        if self._table is not None and not self._fitting:
            return
        if state_dict["convention"] != self.convention:
            raise MisconfigurationException(
                f"FLOPsCallback(convention={self.convention!r}): the totals in the checkpoint are counted by "
                f"convention={state_dict['convention']!r}; continue with that one"
            )
        self._run = RunCost(**state_dict["run"])
        self._set_counts(state_dict["counts"])
        self._set_table(state_dict["table"] and CostTable.from_state_dict(state_dict["table"]))

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds log and log_dict to the module, which a pickled callback must not drag along.
        kept = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**kept, "_tracer": None, "_watching": ExitStack(), "_module": None}

    def _set_table(self, table: CostTable | None) -> None:
        self._table, self._forward = table, None
        self._forward_dense = forward_cost(table, {}, self.convention) if table else 0

    def _accept(self, table: CostTable | None) -> None:
        """Take a measurement, unless it saw no product: such a batch is no example of those to come."""
        patient = self._empty < 10
        if table is None or (patient and not table.layers and not table.other):
            return
        self._set_table(table)
        self._warn_of_unknown()
        if not table.layers and not table.other:
            rank_zero_warn("FLOPsCallback: the first batches ran no product; the FLOPs of this model are 0")

    def _set_counts(self, counts: Mapping[str, int]) -> None:
        if counts != self._counts:
            self._counts, self._forward = dict(counts), None

    def _warn_of_unknown(self) -> None:
        unknown = self._table.unknown if self._table else ()
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            rank_zero_warn(
                f"FLOPsCallback: not counted are the operators {', '.join(unknown[:5])}{more}; a product "
                "with their result counts as one without a parameter, at full density"
            )

        seen = {layer.name for layer in self._table.layers} if self._table else set()
        unseen = sorted(self._counts.keys() - seen)
        if unseen:
            more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
            rank_zero_warn(
                f"FLOPsCallback: no product with {', '.join(unseen[:5])}{more} was seen (FSDP hides them): "
                "what these layers cost is counted at full density, or they took no part"
            )

    def _samples(self, batch: Any) -> int:
        if batch is None:
            return 0
        try:
            return extract_batch_size(batch)
        except (MisconfigurationException, RecursionError) as error:
            if not self._warned:
                rank_zero_warn(
                    f"FLOPsCallback: a batch of type {type(batch).__name__} counts as one sample: {error}"
                )
            self._warned = True
            return 1

    def _forward_now(self, table: CostTable) -> int:
        """f_S; computed again only after the counts have changed."""
        if self._forward is None:
            self._forward = forward_cost(table, self._counts, self.convention)
        return self._forward

    def _levels(self, table: CostTable) -> dict[str, float]:
        forward, run = self._forward_now(table), self._run
        return {  # floats, since a logger may refuse an integer of more than 64 bits
            "flops/forward": float(forward),
            "flops/forward_ratio": ratio(forward, self._forward_dense),
            "flops/train": float(run.train),
            "flops/train_ratio": ratio(run.train, run.train_dense),
        }


def _sparsifier(trainer: Trainer) -> Sparsifier | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set from outside
    return next((c.sparsifier for c in callbacks if isinstance(c, RigLCallback)), None)


def _fits(table: CostTable, module: LightningModule) -> bool:
    """Whether the table was measured on a model with these layers; shards are flat and not compared."""
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(module).items()}
    return all(
        layer.name in shapes and (shapes[layer.name] == layer.shape or len(shapes[layer.name]) == 1)
        for layer in table.layers
    )
