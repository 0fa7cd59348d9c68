"""Weight averages mix topologies; ours have the zeros of the masks at any time, as the weights do."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel

from lightning_rigl.model.layers import named_parameters
from lightning_rigl.model.sparsifier import Sparsifier


def mask_averages(trainer: Trainer, sparsifier: Sparsifier) -> None:
    """Set the averages to zero where there is no connection.

    Done whenever masks change, it holds in between, for zeros are averaged with zeros: whatever is validated,
    saved or returned is masked. As the optimizer's state, the average of a dropped connection is fresh.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            average = callback._average_model
            model = average.module if isinstance(average, AveragedModel) else average
            for name, values in named_parameters(model).items() if model is not None else ():
                if name in sparsifier.layers:
                    values.detach().copy_(sparsifier.layers[name].masked(values))
