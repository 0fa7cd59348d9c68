"""The report of `compact` adds up, and says what was left."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rigl.export.compaction import compact
from tests.export.compact_networks import convolutional, cut


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("kinds", [["padded", "residual"], ["squeeze", "grouped"], ["scaled", "depthwise"]])
def test_rows_add_up_to_the_total_and_the_total_is_the_models(kinds):
    model, x = cut(convolutional(kinds, 8, "flat"), 0.1).eval(), torch.randn(2, 3, 13, 13)
    small = compact(model, x)
    report = small.report
    for i, net in enumerate((model, small)):
        assert report.parameters[i] == sum(p.numel() for p in net.parameters())
        assert report.flops[i] == flops(net, x)
    table = report.table()
    numbers = [
        [int(n.replace(",", "")) for cell in row[3:] for n in cell.split(" of ")] for row in table.rows
    ]
    total = [int(n.replace(",", "")) for cell in table.total[3:] for n in cell.split(" of ")]
    assert [sum(column) for column in zip(*numbers, strict=True)] == total
    assert str(report) == str(table)


def test_shared_parameters_count_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model, x = cut(Shared(), 0.3), torch.randn(2, 6)
    report = compact(model, x).report
    assert report.parameters == (48, 48)
    assert report.flops == (3 * 2 * 2 * 36,) * 2


def test_attention_is_counted_and_the_reason_is_given():
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    report = compact(model.eval(), torch.randn(1, 3, 4)).report
    assert report.flops[0] >= 2 * 3 * (4 * 8 + 4 * 8 * 8 + 2 * 8 * 16)  # every product with a weight
    assert "1 keeps its units: TransformerEncoderLayer stays whole" in str(report)
    assert "0 keeps its units: read whole by 1 (TransformerEncoderLayer)" in str(report)
    assert report.error == 0


def test_a_rich_table():
    rich = pytest.importorskip("rich.console")
    report = compact(
        cut(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 0.2), torch.randn(1, 4)
    ).report
    console = rich.Console(record=True, width=120, file=open("table.txt", "w"))  # noqa: SIM115
    console.print(report)
    assert "compacted" in console.export_text()
