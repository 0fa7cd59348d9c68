"""RigLCallback: when to call what. It translates Lightning's hooks and holds no arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_rigl.callbacks import packed_checkpoints
from lightning_rigl.callbacks.averaging import mask_averages
from lightning_rigl.callbacks.checks import (
    concerns,
    known_cause,
    refuse_module,
    refuse_optimizers,
    refuse_shared,
    refuse_stale_masks,
    refuse_trainer,
    trained_before,
)
from lightning_rigl.callbacks.clock import Clock, shortfall, unfinished
from lightning_rigl.callbacks.empty_step import EmptyStep
from lightning_rigl.callbacks.first_look import first_look
from lightning_rigl.callbacks.held_out import HeldOut
from lightning_rigl.callbacks.rhythm import log_hyperparameters, log_levels, log_step, sparsity_levels
from lightning_rigl.compute import mode
from lightning_rigl.methods.base import Method
from lightning_rigl.model import initial_masks, latent, layers, optimizer_state, sparse_init
from lightning_rigl.model.grown import refuse_growth
from lightning_rigl.model.mask_files import IDENTITY, check_state, identity, unpack_masks
from lightning_rigl.model.sparsifier import Sparsifier
from lightning_rigl.topology.distributions import Distribution
from lightning_rigl.topology.growth import Growth
from lightning_rigl.topology.patterns import Pattern
from lightning_rigl.topology.schedules import UpdateSchedule
from lightning_rigl.topology.tables import Table, density_table

SEARCHES = (".lr_find_", ".scale_batch_size_")  # names of the checkpoints that Lightning's tuners write


class RigLCallback(Callback):
    """Train a sparse network from the first step, with RigL or one of its relatives.

    The masks live here; the weights of inactive connections are real zeros in ordinary parameters, so that
    the model's own checkpoints load without this package. A topology update takes the place of an optimizer
    step.

    Args:
        sparsity: fraction of zeros over the sparse layers, in [0, 1); or regular expression (searched in the
            parameter name, first match wins) -> sparsity of that layer, unmatched layers staying dense.
        method: who decides what is dropped and grown: rigl, set, static, snfs, gradual, snip and others
            (docs/choose.md lists them), or a Method.
        distribution: how the connections are shared between layers: erk, er, uniform, smartratio, str, or a
            Distribution.
        schedule: when the topology is updated and how much of it; None is the method's own default. A method
            that never updates ignores it.
        pattern: where connections may live: unstructured, or a Pattern.
        include: regular expressions of the parameters to make sparse, in place of the default: linear layers,
            convolutions except depthwise ones, RNN weights, attention projections.
        exclude: regular expressions of parameters that stay dense.
        init: random masks, those of largest magnitude of a pretrained model, the nonzero weights as they are,
            or the path of a checkpoint or mask file.
        seed: of all randomness here; None is the first process's torch.initial_seed(). The global generator
            is never used.
        growth: what new connections are worth; None is zero, with fresh optimizer state.
        growth_data: batches as for ``training_step``, whose gradient the updates read in place of that
            of the step; for methods that read it at updates. Each takes the next batch, over and over: a
            loader or a list, no iterator that ends. Their own cost is not counted.
        rescale: multiply the initial weights so that each ``layer``, or each ``neuron``, sees the variance of
            the dense one; None leaves them. For a model at its initialisation only.
        compute: how linear layers compute while fitting: dense, as the model does it; native or torch, by
            products that skip the zeros, on the CPU in float32 (docs/speed.md); auto, by the better of these
            where a layer gains.
        pack_checkpoints: write checkpoints without the zeros, an eighth as large at 90 %. A Trainer with this
            callback reads them whether or not this is set; without it (``load_from_checkpoint``) they are
            made plain by `lightning_rigl.export.unpack_checkpoint` first.

    Raises:
        ValueError: bad input, before anything is changed.

    Reference:
        Evci et al., *Rigging the Lottery*, ICML 2020, arXiv:1911.11134.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_rigl import RigLCallback, UpdateSchedule
        >>> rigl = RigLCallback(sparsity=0.9, schedule=UpdateSchedule(every=100, end=0.75))
        >>> trainer = Trainer(callbacks=[rigl], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.9,
        method: Method | str = "rigl",
        distribution: Distribution | str = "erk",
        schedule: UpdateSchedule | None = None,
        pattern: Pattern | str = "unstructured",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        init: Literal["random", "magnitude", "nonzero"] | str = "random",
        seed: int | None = None,
        growth: Growth | None = None,
        rescale: Literal["layer", "neuron"] | None = None,
        growth_data: Iterable[Any] | None = None,
        compute: mode.Compute = "dense",
        pack_checkpoints: bool = False,
    ) -> None:
        mode.check(compute)
        if isinstance(seed, bool) or not isinstance(seed, (int, type(None))):
            raise TypeError(f"seed: an int or None, got {seed!r}")
        self.settings: dict[str, Any] = {
            "sparsity": sparsity,
            "method": Method.of(method),
            "distribution": Distribution.of(distribution),
            "schedule": schedule,
            "pattern": Pattern.of(pattern),
            "include": include,
            "exclude": exclude,
            "init": init,
            "seed": seed,
            "growth": growth,
            "rescale": rescale,
            "compute": compute,
        }
        self._refuse_settings(growth_data)
        self._held_out = None if growth_data is None else HeldOut(growth_data)
        self._packs = pack_checkpoints
        self.sparsifier: Sparsifier | None = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until the model is there
        self._module: weakref.ref[LightningModule] | None = None  # the one that Lightning runs now
        self._owner: weakref.ref[LightningModule] | None = None  # the one whose weights the state goes with
        self._fitting = False
        self._resumed = False
        self._dense_checkpoint = False  # the weights come from a run without this callback
        self._searching = False  # a search for a learning rate or a batch size puts back what it found
        self._clock = Clock()
        self._updated = False  # in this batch
        self._empty_step = EmptyStep()
        self._said: set[str] = set()

    def _refuse_settings(self, growth_data: Iterable[Any] | None) -> None:
        """Refuse what no model can be trained with."""
        settings, method = self.settings, self.settings["method"]
        initial_masks.check(settings["sparsity"], settings["distribution"], settings["init"])
        if settings["rescale"] is not None:
            sparse_init.refuse(method, settings["rescale"])
        for name in ("include", "exclude"):
            layers.check_patterns(name, settings[name])
        refuse_growth(method, Growth() if settings["growth"] is None else settings["growth"])
        latent.refuse_pattern(method, settings["pattern"])
        if not isinstance(settings["schedule"], (UpdateSchedule, type(None))):
            raise TypeError(f"schedule: expected an UpdateSchedule or None, got {settings['schedule']!r}")
        if growth_data is not None and method.gradient != "at_updates":
            name = type(method).__name__
            raise ValueError(f"growth_data: {name} does not read the gradient at updates; leave it out")

    @property
    def masks(self) -> dict[str, Tensor]:
        """Cleaned parameter name -> bool tensor, True = active; they change in place at updates."""
        if self.sparsifier is not None:
            self._refuse_stale()
            return self.sparsifier.masks
        if self._state:
            return unpack_masks(self._state["masks"])
        raise RuntimeError(
            "there are no masks here: trainer.fit makes them, or loads them with a checkpoint; ddp_fork, "
            "ddp_spawn and ddp_notebook leave them in the processes that trained, and "
            "load_masks(trainer.checkpoint_callback.best_model_path) reads them from a checkpoint"
        )

    def summary(self) -> Table:
        """A table of the sparse layers: shape, active of total, density. Print it."""
        if self.sparsifier is not None:
            self._refuse_stale()
            return self.sparsifier.summary()
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        counts = {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}
        return density_table(f"sparse layers ({type(self.settings['method']).__name__})", shapes, counts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is changed."""
        self._module, self._fitting, self._resumed = weakref.ref(pl_module), stage == "fit", False
        if self._fitting:
            refuse_trainer(trainer)
            self._clock.set_up(trainer)
            self._dense_checkpoint = False
        packed_checkpoints.around(trainer, self._masks_now if self._packs else None)

    def _masks_now(self) -> dict[str, Tensor]:
        return self.sparsifier.masks if self.sparsifier else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the masks, or take those of the checkpoint; from here on the model is sparse."""
        refuse_module(pl_module)
        refuse_optimizers(trainer)
        if self.sparsifier is not None:
            self.sparsifier.leave_step(loaded=True)
        state, self._state = self._state, {}
        if self._owner is None or self._owner() is not pl_module:
            state = {}  # it goes with the weights of another model
        known = self.sparsifier is not None and self.sparsifier.model is pl_module
        if not state and known:
            refuse_stale_masks(self._active())
            if not self._active().is_current():
                state = self._active().state_dict()  # the parameters have moved, or have another type
        if state:
            masks = check_state(state, identity(**{kind: self.settings[kind] for kind in IDENTITY}))
            self.sparsifier = self._new_sparsifier(trainer, pl_module, masks)
            self.sparsifier.load_state_dict(state)
        elif not known:
            method = self.settings["method"]
            schedule = method.schedule and (self.settings["schedule"] or method.schedule)
            self._clock.refuse_unknown(trainer, schedule)
            rules = self.settings["include"], self.settings["exclude"]
            if method.schedule:
                refuse_shared(trainer, pl_module, *rules)
            if self.settings["init"] == "random":
                self._say(trained_before(pl_module, *rules, self._dense_checkpoint))
            self.sparsifier = self._new_sparsifier(trainer, pl_module, self.settings["init"])
            self._clock.steps = {}
        mask_averages(trainer, self._active())

    def _new_sparsifier(
        self, trainer: Trainer, module: LightningModule, init: str | dict[str, Tensor]
    ) -> Sparsifier:
        own = self.settings["seed"]
        seed = trainer.strategy.broadcast(torch.initial_seed() if own is None else own)
        again = {} if isinstance(init, str) else {"rescale": None}  # the weights are trained by now
        return Sparsifier(module, **{**self.settings, **again, "init": init, "seed": int(seed)})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule now that the length of training is known; a resumed run keeps its own."""
        if self._state:
            self.on_fit_start(trainer, pl_module)  # strategies that shard restore a checkpoint after it
        sparsifier = self._active()
        inside = any(layer.last == trainer.global_step for layer in sparsifier.layers.values())
        resumed = self._resumed and (trainer.global_step > 0 or inside)  # inside step 0, after its update
        step = self._clock.start(trainer, sparsifier.schedule, resumed)
        if resumed:
            sparsifier.layers.check_agreement()
            sparsifier.engage(trainer.global_step)
            for optimizer in trainer.optimizers:
                optimizer_state.widen(optimizer, sparsifier.layers.of(optimizer))
        else:
            sparsifier.start(self._clock.length, step)
            for optimizer in trainer.optimizers:
                sparsifier.reset_state(optimizer)
        if sparsifier.compute.asked and str(trainer.precision) not in ("32", "32-true"):
            self._say(
                f"precision={trainer.precision!r}: products that skip zeros are float32, all others are dense"
            )
        for words in sparsifier.compute.words:
            self._say(words)
        if self._held_out:
            self._held_out.start(sparsifier, self._resumed)
        for message in (
            shortfall(trainer, sparsifier, self._clock.length, resumed or sparsifier.updates > 0),
            *concerns(trainer),
        ):
            self._say(message)
        log_hyperparameters(trainer, sparsifier, self.settings)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the method see the first batch, and disturb the weights, if it does so."""
        first_look(trainer, pl_module, batch, batch_idx, self._active())
        if not self._clock.is_over(trainer):  # then statistics are collected for averaged weights
            self._active().before_forward(trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Have a dense gradient where the step needs it; by hand those of passes may add up."""
        for optimizer in trainer.optimizers:
            step, time = self._clock.step(trainer, optimizer), self._clock.time(trainer)
            self._active().expect(optimizer, step, time)
            if not pl_module.automatic_optimization:
                self._active().restore_gradients(optimizer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In manual optimization mask the gradients now, and keep them: the user may clip before the step.

        What a latent method trains has all gradients, and is clipped as the user does it.
        """
        self._empty_step.backward = True
        sparsifier = self._active()
        if not pl_module.automatic_optimization and not sparsifier.method.latent:
            time = self._clock.time(trainer)
            for optimizer in trainer.optimizers:
                if not sparsifier.sees_gradient(optimizer, self._clock.step(trainer, optimizer), time):
                    sparsifier.mask_gradients(optimizer)
                elif getattr(trainer.precision_plugin, "scaler", None) is None:  # else they are scaled now
                    sparsifier.keep_gradients(optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Update the topology in place of this step, or mask the gradients before they are clipped."""
        sparsifier, step = self._active(), self._clock.step(trainer, optimizer)
        time = self._clock.time(trainer)
        self._clock.tick(trainer, optimizer)
        over = self._clock.is_over(trainer)
        scaler = self._empty_step.scaler(trainer, optimizer)
        if scaler and (over or sparsifier.sees_gradient(optimizer, step, time)):
            scaler.unscale_(optimizer)
        if self._held_out and not over and sparsifier.is_due(optimizer, step, time):
            self._held_out.keep(trainer, pl_module, sparsifier)
        if over:
            optimizer.zero_grad()  # they are of the last epoch, and the weights are the average now
        elif sparsifier.before_step(optimizer, step, time):
            self._updated = True
            mask_averages(trainer, sparsifier)
        self._empty_step.leave_unclipped(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the zeros where an optimizer moves them, and log."""
        sparsifier = self._active()
        sparsifier.after_step()
        self._clock.settle()
        self._say_what_happened()
        if sparsifier.mixing or sparsifier.method.latent or self._updated:
            mask_averages(trainer, sparsifier)
        log_step(trainer, pl_module, self._levels, event=self._updated)
        self._updated = False
        self._empty_step.over(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer and the module as they were; say in words what torch may have said."""
        self._say(known_cause(trainer, exception))
        self._empty_step.over(trainer)
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more at what may have gone past the hooks, and log the levels to be monitored."""
        self._active().check_zeros()
        self._say_what_happened()
        if not trainer.barebones:
            log_levels(pl_module, self._levels(), on_step=False)
        thawed = [name for name, parameter in self._active().frozen.items() if parameter.requires_grad]
        if thawed:
            names = ", ".join(thawed[:5])
            self._say(f"{names} were frozen when the masks were made: they train now, and stay dense")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if there was no update, or pruning has not come to its end, where that was not foreseen."""
        sparsifier = self._active()
        if sparsifier.timetable and not pl_module.automatic_optimization:
            self._say(unfinished(sparsifier))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the weights as they are between two steps, also inside one."""
        for key in ("state_dict", "current_model_state"):  # the latter of Lightning's averages
            if self.sparsifier is not None and key in checkpoint:
                self.sparsifier.put_at_rest(checkpoint[key])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See whether it is one of a run without this callback, or a search's copy of what is here."""
        self._searching = Path(trainer.ckpt_path or "").name.startswith(SEARCHES)
        if not self._searching:
            self._dense_checkpoint = self.state_key not in checkpoint.get("callbacks", {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit is over: the weights may change without the masks from here on."""
        self._fitting = False
        self._leave()

    def _leave(self) -> None:
        if self.sparsifier is not None:
            self.sparsifier.leave_step()
            self.sparsifier.release()

    def _refuse_stale(self) -> None:
        if not self._fitting:
            refuse_stale_masks(self._active())

    def state_dict(self) -> dict[str, Any]:
        """Masks at one bit a weight, the resolved schedule and the counters, in plain types."""
        if self.sparsifier is None:
            return self._state
        self._refuse_stale()
        return self._saved()

    def _saved(self) -> dict[str, Any]:
        if self.sparsifier is None:
            return self._state
        return {**self.sparsifier.state_dict(), **self._clock.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until a fit starts; validate and test load one too, with weights it goes with."""
        self._state, self._owner = state_dict, self._module
        self._resumed = self._resumed or (self._fitting and not self._searching)
        if self._fitting:
            self._clock.load_state_dict(state_dict)
        if self.sparsifier is not None and self._module and self.sparsifier.model is self._module():
            self.sparsifier = None  # its masks are not those of the weights any more

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: masks and counters travel as a checkpoint's state."""
        self._sent = self._saved()  # kept here: a process that is started maps this memory
        left = ("log", "log_dict", "_sent")
        kept = {key: value for key, value in vars(self).items() if key not in left}
        return {**kept, "sparsifier": None, "_module": None, "_owner": None, "_state": self._sent}

    def _active(self) -> Sparsifier:
        assert self.sparsifier is not None, "on_fit_start makes it"
        return self.sparsifier

    def _levels(self) -> dict[str, float]:
        return sparsity_levels(self._active())

    def _say_what_happened(self) -> None:
        if self._active().postponed:
            self._say(
                "a topology update was due but a gradient was not finite, or there was none; it takes place "
                "at the next step whose gradients are finite"
            )
        self._say(self._active().compute.idle())
        if self._active().mixing:
            self._say("the optimizer moves inactive weights; they are set back to zero after each step")

    def _say(self, message: str | None) -> None:
        """A warning, once."""
        if message and message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"RigLCallback: {message}.")
