"""Methods side by side: the studies, and the folder DIR with their data.

    python benchmarks/methods.py all --data-dir DIR           MNIST, 20 epochs, every method at 90 and 98 %
    python benchmarks/methods.py orders --data-dir DIR        MNIST, three methods with one thing changed
    python benchmarks/methods.py long --data-dir DIR          MNIST, 100 epochs, four systems at 98 %
    python benchmarks/methods.py equal-flops --data-dir DIR   MNIST, the training FLOPs of 10 dense epochs
    python benchmarks/methods.py published --data-dir DIR     MNIST, 100 epochs, beside published values
    python benchmarks/methods.py text --data-dir DIR          a GRU on characters, 2,000 steps
    python benchmarks/methods.py cifar --data-dir DIR         a small WideResNet on CIFAR-10
    python benchmarks/methods.py cifar --protocol paper --data-dir DIR        WRN-22-2, 250 epochs, on a GPU

MNIST: mnist.npz, or torchvision's MNIST/raw; text: tinyshakespeare.txt; cifar: cifar10_jpeg.npz. Results and
a picture are stored after every run under ``results/``, and runs that stand there are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import cifar_study
import mnist_methods
import mnist_studies
import text_study
from machine import RESULTS
from studies import Study, run

STUDIES: dict[str, tuple[Callable[..., Study], int]] = {  # and how many seeds
    "all": (mnist_methods.everything, 3),
    "orders": (mnist_methods.orders, 3),
    "long": (mnist_methods.long, 3),
    "equal-flops": (mnist_studies.equal_flops, 3),
    "published": (mnist_studies.as_published, 1),
    "text": (text_study.study, 1),
    "cifar": (cifar_study.study, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the data, see above")
    parser.add_argument(
        "--seeds", type=int, help="of each method; by default 3, and 1 of published, text and cifar"
    )
    parser.add_argument("--protocol", choices=cifar_study.PROTOCOLS, help="of cifar; by default short")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(argv)
    if chosen.protocol and chosen.study != "cifar":
        parser.error(f"--protocol {chosen.protocol}: only cifar has protocols, not {chosen.study}")
    build, seeds = STUDIES[chosen.study]
    protocol = (chosen.protocol,) if chosen.protocol else ()
    words = [f"python benchmarks/methods.py {chosen.study}", *(f"--protocol {name}" for name in protocol)]
    try:
        study = build(chosen.seeds or seeds, *protocol)
        study.look(chosen.data_dir)
        run(study, chosen.data_dir, chosen.output, chosen.workers, " ".join([*words, "--data-dir DIR"]))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
