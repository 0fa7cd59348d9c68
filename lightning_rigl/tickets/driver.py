"""LotteryTickets: train, prune, rewind and train again, a loop around ``trainer.fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_rigl.callbacks.rigl import RigLCallback
from lightning_rigl.model.layers import check_patterns, clean_name
from lightning_rigl.model.mask_files import load_masks
from lightning_rigl.tickets.folder import Folder, Ticket, tickets_table, write_tensors
from lightning_rigl.tickets.magnitude import pruned, to_prune
from lightning_rigl.tickets.recorder import Recorder
from lightning_rigl.topology.tables import Table

REWINDS = ("init", "learning_rate")


class LotteryTickets:
    """Iterative magnitude pruning with rewinding.

    Round 0 trains the dense model. Each later round removes a share of the remaining connections, those of
    smallest magnitude over all layers at the end of the round before, and trains again:

    - ``rewind="init"``: from the weights before the first step, over the whole training;
    - ``rewind=k``: from round 0 as it was after k optimizer steps (weights, buffers, optimizer state,
      learning rate, place in the epoch), over the steps that are left from there;
    - ``rewind="learning_rate"``: from the final weights and buffers of the round before, with a fresh
      optimizer and the learning-rate schedule from its start, over the whole training.

    Everything is kept in the folder. The same call goes on where it was stopped, between rounds and inside
    one; with a higher ``rounds`` it goes on from a finished run. User callbacks begin each round anew.

    Args:
        folder: of this run alone; later calls must prune, rewind and train alike, and as long.
        model: makes the module, once for each round; every round but the first replaces its weights.
        trainer: makes a Trainer for each round, with the callbacks that it is given among its own. These
            write the checkpoints, so leave ``enable_checkpointing`` as it is.
        rounds: prunings, at least 1: the last density is about (1 - prune) ** rounds.
        prune: share of the remaining connections that a round removes, in (0, 1); rounded up.
        rewind: ``init``, ``learning_rate``, a step k, or a fraction of training in (0, 1), rounded down to a
            step of at least 1.
        include: regular expressions of the parameters to prune, in place of the default; see `RigLCallback`.
        exclude: regular expressions of parameters that stay dense.
        save_every: optimizer steps between checkpoints inside a round; None is at the end of each epoch.

    Raises:
        ValueError, TypeError: bad input, before anything is written.

    Reference:
        Frankle & Carbin, *The Lottery Ticket Hypothesis*, ICLR 2019, arXiv:1803.03635 (``init``);
        Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, ICML 2020,
        arXiv:1912.05671 (step k); Renda et al., *Comparing Rewinding and Fine-tuning in Neural Network
        Pruning*, ICLR 2020, arXiv:2003.02389 (``learning_rate``).

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> tickets = LotteryTickets(
        ...     "tickets/boring", BoringModel, lambda callbacks: Trainer(max_epochs=2, callbacks=callbacks),
        ...     rounds=10, prune=0.2, rewind=0.05,
        ... )
        >>> tickets.tickets
        []
    """

    def __init__(
        self,
        folder: str | Path,
        model: Callable[[], LightningModule],
        trainer: Callable[[list[Callback]], Trainer],
        rounds: int,
        prune: float = 0.2,
        rewind: Literal["init", "learning_rate"] | int | float = "init",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        save_every: int | None = None,
    ) -> None:
        _check_makers(model, trainer)
        _check_count("rounds", rounds)
        if save_every is not None:
            _check_count("save_every", save_every)
        if isinstance(prune, bool) or not isinstance(prune, float) or not 0 < prune < 1:
            raise ValueError(f"prune: the share that a round removes, a number in (0, 1), got {prune!r}")
        _check_rewind(rewind)
        self.folder = Folder(folder)
        self.rounds, self.save_every = rounds, save_every
        self.prune, self.rewind = float(prune), rewind
        self.include, self.exclude = _patterns("include", include), _patterns("exclude", exclude)
        self._model, self._trainer = model, trainer

    @property
    def tickets(self) -> list[Ticket]:
        """The finished rounds of the folder."""
        return self.folder.tickets()

    def summary(self) -> Table:
        """A table of the finished rounds: connections, density, steps, metrics. Print it."""
        return tickets_table(self.tickets)

    def run(
        self, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None
    ) -> list[Ticket]:
        """Train the rounds that are not finished.

        Args:
            train_dataloaders: as in ``trainer.fit``, like the two that follow.
            val_dataloaders: the same.
            datamodule: the same.

        Returns:
            All finished rounds, the dense one first.

        Raises:
            ValueError: the folder holds tickets of other settings or another model, or has lost a file;
                pruning would leave a layer without connections. The rounds before stay.
            MisconfigurationException: a Trainer or a scheduler that tickets cannot be made with; another
                length of training than that of the rounds before.
            RuntimeError: a round has nothing to train.
        """
        settings = {name: getattr(self, name) for name in ("prune", "rewind", "include", "exclude")}
        self.folder.check(settings)
        for index in range(len(self.tickets), self.rounds + 1):
            module, masks = self._new_module(), self._masks(index)
            rules = self.include, self.exclude
            rigl = RigLCallback(0.0, "static", include=rules[0], exclude=rules[1], init=masks, seed=0)
            trainer = self._new_trainer([rigl, Recorder(self.folder, index, settings, self.save_every)])
            data = (train_dataloaders, val_dataloaders, datamodule)
            trainer.fit(module, *data, ckpt_path=self._checkpoint(index))
            if len(self.tickets) <= index:
                raise RuntimeError(self._untrained(index))
        return self.tickets

    def _untrained(self, index: int) -> str:
        last = self.folder.file(index, "last.ckpt")
        if last.exists():
            return (
                f"round {index} has not been trained to its end; call run() again, and if nothing is left to "
                f"train, remove {str(last)!r} to repeat the round"
            )
        return (
            f"round {index} has not been trained: is there something to train, batches and max_epochs or "
            "max_steps above 0? Else call run() again"
        )

    def _masks(self, index: int) -> str:
        """The ``init`` of a round: all weights, or the file of the masks that are left of the last ones."""
        if index == 0:
            return "magnitude"  # all of them, at a sparsity of 0
        path = self.folder.file(index, "masks.pt")
        if not path.exists():
            end = self.folder.file(index - 1, "end.ckpt")
            masks, weights = load_masks(end), _load(end)["state_dict"]
            count = to_prune(self.prune, sum(int(mask.sum()) for mask in masks.values()))
            kept = pruned({clean_name(name): weight for name, weight in weights.items()}, masks, count)
            write_tensors(kept, path)
        return str(path)

    def _checkpoint(self, index: int) -> Path | None:
        """What the round goes on from; None is a new training."""
        last, start = self.folder.file(index, "last.ckpt"), self.folder.first
        if last.exists():
            return last
        if index and self.rewind == "learning_rate":
            start = self.folder.file(index, "start.ckpt")
            weights = _load(self.folder.file(index - 1, "end.ckpt"))["state_dict"]
            write_tensors({**_load(self.folder.first), "state_dict": weights}, start)
        elif index and self.folder.read_settings()["step"]:
            start = self.folder.rewind
            if not start.exists():
                raise ValueError(
                    f"{str(start)!r} is missing, and this round begins with it; put it back, or take "
                    "another folder"
                )
        return start if self.folder.settings.exists() else None

    def _new_module(self) -> LightningModule:
        module = self._model()
        if not isinstance(module, LightningModule):
            raise TypeError(f"model: must return a LightningModule, got {type(module).__name__}")
        return module

    def _new_trainer(self, callbacks: list[Callback]) -> Trainer:
        try:
            trainer = self._trainer(list(callbacks))
        except MisconfigurationException as error:
            if "enable_checkpointing" not in str(error):
                raise
            raise MisconfigurationException(
                "trainer: the callbacks of a round write its checkpoints; leave enable_checkpointing as it "
                "is (Lightning's own checkpoint callback is not added beside them)"
            ) from error
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: must return a lightning.pytorch.Trainer, got {type(trainer).__name__}")
        known = {id(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]  # set by a connector
        if not {id(callback) for callback in callbacks} <= known:
            raise ValueError(
                "trainer: the Trainer does not have the callbacks that it was given; make a new one for each "
                "round, such as trainer=lambda callbacks: Trainer(max_epochs=10, callbacks=callbacks)"
            )
        return trainer


def _load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _check_makers(model: object, trainer: object) -> None:
    if isinstance(model, nn.Module) or not callable(model):
        raise TypeError(
            f"model: a function or class that makes the module, as each round trains a new one, got {model!r}"
        )
    if not callable(trainer):
        raise TypeError(f"trainer: a function that makes a Trainer from a list of callbacks, got {trainer!r}")


def _patterns(name: str, given: Sequence[str] | None) -> list[str] | None:
    check_patterns(name, given)
    return None if given is None else list(given)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: a whole number of at least 1, got {value!r}")


def _check_rewind(rewind: object) -> None:
    words = "'init', 'learning_rate', a step (int, at least 0), or a fraction of training (float in (0, 1))"
    whole = isinstance(rewind, int) and not isinstance(rewind, bool) and rewind >= 0
    if not (whole or (isinstance(rewind, float) and 0 < rewind < 1) or rewind in REWINDS):
        raise ValueError(f"rewind: {words}, got {rewind!r}")
