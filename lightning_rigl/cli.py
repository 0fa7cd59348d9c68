"""The command line ``lightning-rigl``: LightningCLI, with the names of this package known to it."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import cli

import lightning_rigl  # noqa: F401  jsonargparse knows the short names of classes that are imported


def main(args: cli.ArgsType = None) -> None:
    """Run a LightningCLI in subclass mode: ``lightning-rigl fit --config FILE``.

    Model, data, callbacks and their parts are given by name, in YAML or as options; ``--print_config`` shows
    all of them, ``lightning-rigl fit --trainer.callbacks.help RigLCallback`` explains one.

    Args:
        args: what stands behind ``lightning-rigl``, or the same as a dict; None reads ``sys.argv``.
    """
    if not cli._JSONARGPARSE_SIGNATURES_AVAILABLE:
        sys.exit("lightning-rigl: the command line needs jsonargparse: pip install 'lightning-rigl[cli]'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a config can name the user's own classes
    cli.LightningCLI(args=args)
