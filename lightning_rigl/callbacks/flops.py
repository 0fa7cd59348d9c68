"""FLOPsCallback: measure the model, then add up the cost of each step."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_rigl.callbacks.budget import Budget
from lightning_rigl.callbacks.meter import Meter
from lightning_rigl.callbacks.rhythm import log_levels, log_step
from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.flops.costs import Convention, check_convention
from lightning_rigl.flops.formulas import RunCost
from lightning_rigl.flops.report import FLOPsReport, ratio, report
from lightning_rigl.model import sharding
from lightning_rigl.model.sparsifier import Sparsifier


class FLOPsCallback(Callback):
    """Counts the FLOPs of a model and of its training, sparse or dense.

    The model is measured on a copy without values, or else by watching the real step, once for each kind of
    batch (its shapes and types, and which parameters are trained); nothing stays attached. Three totals are
    kept, in exact integers: ``train``, by the paper's rule (3 f_S a sample, 2 f_S + f_D where the method
    reads the gradient of inactive connections, at the active connections of a `RigLCallback` in the same
    trainer), ``train_dense`` (3 f_D), and ``train_actual``, the products that autograd really runs. Without a
    `RigLCallback` the dense model is counted. Evaluation is not part of training and is not counted.

    Logs ``flops/forward`` (per sample), ``flops/train`` (so far) and their ratios to the dense model,
    ``flops/forward_ratio`` and ``flops/train_ratio``, and ``flops/train_actual``, at topology updates, every
    ``log_every_n_steps`` and at epoch ends. In a distributed run these are of one device;
    ``flops/train_all_devices``, at epoch ends, is the sum. Totals continue from fit to fit and from a
    checkpoint, which holds those of the first device; another module starts them anew.

    Args:
        convention: ``2mac`` counts two FLOPs per multiply-add of a weight; ``official`` adds one per output
            element of each layer, as the counter behind the published tables does. ``train_actual`` is
            always counted in multiply-adds.
        budget: FLOPs of training, over all devices, after which it stops, or a multiple such as ``"1.0x"`` of
            what the configured training would cost the dense model. The last step is the last that fits, if
            no batch is larger than those before it. To have schedules follow the budget, give the Trainer
            the steps that `steps_for_budget` finds.

    Raises:
        ValueError: an unknown convention; a budget that is no positive number and no multiple.
        MisconfigurationException: when training starts, for a multiple of an unknown length or a number that
            does not pay for the first step.

    Reference:
        Evci et al., *Rigging the Lottery: Making All Tickets Winners*, ICML 2020, arXiv:1911.11134, app. H.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> flops = FLOPsCallback(budget="0.5x")
        >>> trainer = Trainer(callbacks=[flops], logger=False, enable_checkpointing=False)
    """

    def __init__(self, convention: Convention = "2mac", budget: float | str | None = None) -> None:
        check_convention(convention)
        self.convention: Convention = convention
        self._budget = None if budget is None else Budget(budget)
        self._start_anew()
        # optimizer steps, and the step of each layer's last update, when the current batch started
        self._before: tuple[int, dict[str, int]] = 0, {}
        self._passes = 0  # backward passes of the current batch
        self._module: weakref.ref[LightningModule] | None = None  # the one whose training is counted
        self._fitting = False

    def _start_anew(self) -> None:
        self._meter, self._run = Meter(self.convention), RunCost()
        self._all_devices: int | None = None  # training so far, as of the last epoch end
        if self._budget:
            self._budget.forget()

    def report(self) -> FLOPsReport:
        """What the model costs now, layer by layer, and what its training has cost so far on this device.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        meter, table = self._meter, self._meter.table
        if table is None:
            raise RuntimeError("nothing is measured yet: FLOPs are known after the first training batch")
        return report(table, meter.counts, self._run, self.convention, meter.inference, self._all_devices)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew if a fit begins with another module; a checkpoint's totals come later."""
        self._fitting = stage == "fit"
        if self._fitting and self._module is not None and self._module() is not pl_module:
            self._start_anew()
        if self._fitting or self._module is None:
            self._module = weakref.ref(pl_module)
        if self._fitting and self._budget:
            self._budget.set_up(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew if the totals belong to another model; stop if the budget is spent already."""
        if not self._meter.fits(pl_module):
            rank_zero_warn("FLOPsCallback: these layers are not those counted so far; the totals start anew")
            self._start_anew()
        if self._budget:
            self._budget.start(trainer, sharding.total(self._run.train, pl_module.device))
            self._budget.check(trainer, self._run.train, self._meter, _rigl(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the model if it has met no batch like this one; remember what holds before the step."""
        sparsifier = _sparsifier(trainer)
        self._before, self._passes = (trainer.global_step, _last_updates(sparsifier)), 0
        self._meter.open(trainer, pl_module, batch, batch_idx)
        self._meter.count(sparsifier)
        if self._budget and self._run == RunCost():
            self._budget.refuse_too_little(trainer, self._meter.samples(batch), self._meter)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is not watched; in manual optimization more passes may follow."""
        self._passes += 1
        if pl_module.automatic_optimization:
            self._meter.pause()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """A closure is over: the rest of the step is the optimizer's own."""
        self._meter.own_products(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the cost of the step."""
        samples, sparsifier = self._meter.close(trainer, pl_module, batch, batch_idx), _sparsifier(trainer)
        if trainer.fit_loop._skip_backward:
            return  # an epoch that SWA adds for the statistics of its average
        if pl_module.automatic_optimization:
            samples *= max(self._passes, 1)  # an optimizer may ask for several
        steps, last = self._before
        updated = [name for name, step in _last_updates(sparsifier).items() if step != last.get(name)]
        self._run = self._run.after(
            samples,
            self._meter.cost,
            gradient=sparsifier.method.gradient if sparsifier else "never",
            updated=bool(updated),
            stepped=trainer.global_step != steps,
            part=self._meter.cost_of(updated) if 0 < len(updated) < len(last) else None,
        )
        self._meter.count(sparsifier)
        if self._meter.table is not None:
            log_step(trainer, pl_module, self._levels, event=bool(updated))
        if self._budget:
            self._budget.note(samples, self._meter.cost.of(samples).forward_dense)
            if trainer.global_step != steps:
                self._budget.check(trainer, self._run.train, self._meter, _rigl(trainer))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure inference, on the first validation batch of a fit."""
        if self._fitting and batch_idx == dataloader_idx == 0:
            self._meter.open_inference(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what was measured of it."""
        if self._fitting and batch_idx == dataloader_idx == 0:
            self._meter.close_inference(batch)
            self._meter.count(_sparsifier(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the devices, and log the totals once more, for what looks at epochs."""
        self._meter.stop()  # still open if the epoch was cut short in its first batch
        if trainer.world_size > 1:
            self._all_devices = sharding.total(self._run.train, pl_module.device)
        if self._meter.table is not None and not trainer.barebones:
            log_levels(pl_module, self._levels(epoch=True), on_step=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._meter.stop()

    def state_dict(self) -> dict[str, Any]:
        """The totals and what was measured last, in plain types."""
        return {
            "convention": self.convention,
            "run": asdict(self._run),
            "budget": self._budget.state_dict() if self._budget else None,
            **self._meter.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; one that is validated or tested leaves the totals of a fit alone."""
        if self._meter.table is not None and not self._fitting:
            return
        if state_dict["convention"] != self.convention:
            raise MisconfigurationException(
                f"FLOPsCallback(convention={self.convention!r}): the totals in the checkpoint are counted by "
                f"convention={state_dict['convention']!r}; continue with that one"
            )
        self._start_anew()
        self._run = RunCost(**state_dict["run"])
        self._meter.load_state_dict(state_dict)
        if self._budget and state_dict["budget"]:
            self._budget.load_state_dict(state_dict["budget"])

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds log and log_dict to the module, which a pickled callback must not drag along.
        kept = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**kept, "_module": None}

    def _levels(self, epoch: bool = False) -> dict[str, float]:
        cost, run = self._meter.cost, self._run
        levels = {
            "flops/forward": cost.forward / cost.samples,
            "flops/forward_ratio": ratio(cost.forward, cost.forward_dense),
            "flops/train": run.train,
            "flops/train_ratio": ratio(run.train, run.train_dense),
            "flops/train_actual": run.train_actual,
            **({"flops/train_all_devices": self._all_devices} if epoch and self._all_devices else {}),
        }
        return {name: float(value) for name, value in levels.items()}  # a logger may refuse large integers


def _last_updates(sparsifier: Sparsifier | None) -> dict[str, int]:
    """The step of each layer's last update."""
    return {name: layer.last for name, layer in sparsifier.layers.items()} if sparsifier else {}


def _rigl(trainer: Trainer) -> RigLCallback | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return next((c for c in callbacks if isinstance(c, RigLCallback)), None)


def _sparsifier(trainer: Trainer) -> Sparsifier | None:
    rigl = _rigl(trainer)
    return rigl.sparsifier if rigl else None
