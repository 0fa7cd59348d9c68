"""The command line ``lightning-rigl``: LightningCLI with the names of this package, and ``flops``."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import cli

import lightning_rigl  # noqa: F401  jsonargparse knows the short names of classes that are imported
from lightning_rigl import flops_cli

EPILOG = "lightning-rigl flops --help: what a sparse training will cost, without training"


def main(args: cli.ArgsType = None) -> None:
    """Run a LightningCLI in subclass mode, ``lightning-rigl fit --config FILE``, or ``lightning-rigl flops``.

    Model, data, callbacks and their parts are given by name, in YAML or as options; ``--print_config`` shows
    all of them, ``lightning-rigl fit --trainer.callbacks.help RigLCallback`` explains one.

    Args:
        args: what stands behind ``lightning-rigl``, or the same as a dict; None reads ``sys.argv``.
    """
    if not cli._JSONARGPARSE_SIGNATURES_AVAILABLE:
        sys.exit("lightning-rigl: the command line needs jsonargparse: pip install 'lightning-rigl[cli]'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a config can name the user's own classes
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["flops"]:
        flops_cli.main(given[1:])
    else:
        cli.LightningCLI(args=args, parser_kwargs={"epilog": EPILOG})


if __name__ == "__main__":
    main()
