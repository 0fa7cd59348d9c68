"""`lightning` is the namespace; who has `pytorch_lightning` alone, or mixes the two, is told so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_rigl import RigLCallback
from tests.callbacks.problems import data

ROOT = Path(__file__).parent.parent
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder


class Absent(MetaPathFinder):
    '''As if a package were not installed.'''

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{fullname!r}}", name=fullname)


sys.meta_path.insert(0, Absent())
"""


def run(absent, code):
    script = WITHOUT.format(name=absent) + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_rigl",
        "from lightning_rigl import Sparsifier",
        "import lightning_rigl.model.sparsifier",
    ],
)
def test_without_lightning_the_import_says_what_to_install(code):
    result = run("lightning", code)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr.splitlines()[-1]
    assert "pip install lightning" in result.stderr.splitlines()[-1]
    assert "pytorch_lightning" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_module_that_lightning_itself_misses_is_named_as_it_is():
    result = run("torchmetrics", "import lightning_rigl")
    assert result.returncode == 1
    assert "No module named 'torchmetrics" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_pytorch_lightning_is_not_needed():
    result = run("pytorch_lightning", "import lightning_rigl, sys; assert 'lightning.pytorch' in sys.modules")
    assert result.returncode == 0, result.stderr


class Twin:
    """`Small` of the problems, for a module of either namespace."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_of_pytorch_lightning_is_refused_before_anything_is_changed():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    Module = type("Module", (Twin, pytorch_lightning.LightningModule), {})
    module, rigl = Module(), RigLCallback(0.8)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = pytorch_lightning.Trainer(
        callbacks=[rigl], accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False
    )
    for _ in range(2):
        words = r"callback of lightning\.pytorch, this Trainer is pytorch_lightning.*pip install lightning"
        with pytest.raises(MisconfigurationException, match=words):
            trainer.fit(module, data())
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert rigl.sparsifier is None
