"""FLOPs of the paper's networks beside the published ones; what differs is marked ≠ and explained.

python examples/paper_tables.py          a few seconds on one core; nothing is trained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import paper_numbers as published
from lightning_rigl.topology.tables import Table
from paper_costs import Forward, lenet_forward, mobilenet_v1_forward
from paper_shares import Network, char_lm, mobilenet_v1, mobilenet_v2, resnet50, wrn22x2


@dataclass(frozen=True)
class Row:
    """One system at one sparsity, as shares of the dense network, and what was published of it."""

    system: str
    sparsity: float
    inference: float
    training: float
    source: str = ""
    published: tuple[str, str] = ("", "")


def split(system: str) -> tuple[str, float]:
    """The system whose steps these are, and how many times as long it trains: ``RigL 5x (ERK)``."""
    words = system.split(" ")
    times = next((word for word in words if word[0].isdigit()), "1x")
    return " ".join(word for word in words if word != times), float(times[:-1])


def rows(network: Network) -> Iterator[Row]:
    """A row for each published number, and for each system that is shown anyway."""
    names = [*network.shown, *(row.system for row in network.published)]
    order = [split(name)[0] for name in names]
    names = sorted(dict.fromkeys(names), key=lambda name: (order.index(split(name)[0]), split(name)[1]))
    for sparsity in network.sparsities:
        for name in names:
            found = [row for row in network.published if row.system == name and sparsity in row.shares]
            if found or name in network.shown:
                system, times = split(name)
                forward, step = network.systems[system](sparsity)
                shares = forward / network.dense, times * float(step) / (3 * network.dense)
                yield from (Row(name, sparsity, *shares, row.source, row.shares[sparsity]) for row in found)
                yield from () if found else (Row(name, sparsity, *shares),)


def rounded(ours: float, printed: str) -> str:
    """Our number in the form of the printed one: to as many digits, with an exponent or not."""
    digits, exponent, _ = printed.split(" ")[0].partition("e")
    return f"{ours:.{len(digits.partition('.')[2])}{exponent or 'f'}}"


def differs(ours: float, printed: str) -> bool:
    """Whether the printed number is not ours, rounded; a letter behind it is none of it."""
    return printed != "" and float(rounded(ours, printed)) != float(printed.split(" ")[0])


def beside(ours: float, printed: str) -> str:
    """The printed number, marked if it is not ours; the letter of its note stands in a column of its own."""
    number, _, letter = printed.partition(" ")
    return printed and f"{'≠ ' if differs(ours, printed) else ''}{number} {letter or ' '}"


def share_table(network: Network) -> Table:
    """Our shares beside the printed ones, above the dense network."""
    cells = [
        (
            row.system,
            f"{row.sparsity:g}".lstrip("0"),
            f"{row.inference:.4f}",
            beside(row.inference, row.published[0]),
            f"{row.training:.4f}",
            beside(row.training, row.published[1]),
            row.source,
        )
        for row in rows(network)
    ]
    pairs = zip((network.dense, 3 * network.dense * network.samples), network.dense_published, strict=True)
    costs = ((f"{ours:.3e}".replace("e+0", "e").replace("e+", "e"), beside(ours, p)) for ours, p in pairs)
    dense = ("dense, FLOPs", "", *(cell for cost in costs for cell in cost), "")
    columns = ("share of the dense", "S", "inference", "printed", "training", "printed", "source")
    return Table(network.title, columns, tuple(cells), dense)


def flops_table(
    title: str, forward: Mapping[str, Forward], numbers: Mapping[str, Mapping[float, str]], unit: int
) -> Table:
    """Our FLOPs of inference beside the printed ones, to the same digits."""
    lines = [
        (name, f"{sparsity:g}".lstrip("0"), forward[name](sparsity) / unit, printed)
        for name, of_sparsity in numbers.items()
        for sparsity, printed in of_sparsity.items()
    ]
    cells = [(name, s, rounded(ours, printed), beside(ours, printed)) for name, s, ours, printed in lines]
    equal = sum(not differs(ours, printed) for _, _, ours, printed in lines)
    total = (f"equal: {equal} of {len(lines)}", "", "", "")
    return Table(title, ("inference", "S", "FLOPs", "printed"), tuple(cells), total)


def show(table: Table, notes: Mapping[str, str]) -> None:
    """Print a table, with rich where it is installed, and its notes."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
    except ImportError:
        print(table)
    else:
        drawn = table.__rich__()
        drawn.box, drawn.pad_edge, drawn.collapse_padding = SIMPLE_HEAD, False, True
        Console().print(drawn)
    print(*(f"{letter}  {text}".strip() for letter, text in notes.items()), "", sep="\n")


def main() -> None:
    """Print all tables."""
    for network in (resnet50(), mobilenet_v1(), mobilenet_v2(), wrn22x2(), char_lm()):
        show(share_table(network), network.notes)
    title, numbers = "MobileNet-v1, MFLOPs, official rule", published.MOBILENET_V1_MFLOPS
    show(flops_table(title, mobilenet_v1_forward(), numbers, 10**6), {})
    title, numbers = "LeNet, KFLOPs, 2 FLOPs a multiply-add", published.LENET_KFLOPS
    show(flops_table(title, lenet_forward(numbers), numbers, 10**3), published.LENET_NOTES)


if __name__ == "__main__":
    main()
