"""The compacted model as an ONNX file gives the same outputs in another runtime."""

import pytest
import torch
from torch import nn

from lightning_rigl.export.compaction import compact
from lightning_rigl.export.onnx import to_onnx
from lightning_rigl.export.sparse_model import sparse
from tests.export.compact_networks import convolutional, cut

NEEDED = "writing and running ONNX needs onnx, onnxscript and onnxruntime"


@pytest.fixture
def runtime():
    pytest.importorskip("onnx", reason=NEEDED)
    pytest.importorskip("onnxscript", reason=NEEDED)
    return pytest.importorskip("onnxruntime", reason=NEEDED)


def run(runtime, path, *inputs):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10)), (8, 8)


def convolutions():
    return convolutional(["padded", "residual", "squeeze"], 8, "flat"), (3, 13, 13)


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    return nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 3)), (5, 4)


@pytest.mark.parametrize("network", [perceptron, convolutions, transformer])
def test_equal_outputs_at_any_batch_size(network, runtime, tmp_path):
    model, shape = network()
    model = cut(model, 0.1).eval()
    small = compact(model, torch.randn(1, *shape))
    path = to_onnx(small, torch.randn(1, *shape), tmp_path / "small.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["small.onnx"]  # weights inside
    for samples in (1, 5):
        x = torch.randn(samples, *shape)
        (got,) = run(runtime, path, x)
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_file_is_as_small_as_the_compacted_model(runtime, tmp_path):
    model = cut(nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)), 0.002).eval()
    x = torch.randn(1, 300)
    dense = to_onnx(model, x, tmp_path / "dense.onnx", dynamic_batch=False)
    small = to_onnx(compact(model, x), x, str(tmp_path / "small.onnx"), dynamic_batch=False)
    assert small.stat().st_size < dense.stat().st_size / 5
    (got,) = run(runtime, small, x)
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_bad_input(runtime, tmp_path):
    with pytest.raises(TypeError, match=r"to_onnx: expected a torch.nn.Module, got str"):
        to_onnx("net", torch.zeros(1), tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        to_onnx(nn.Linear(1, 1), torch.zeros(1, 1), tmp_path / "nowhere" / "a.onnx")
    with pytest.raises(ValueError, match=r"Linear cannot be written as ONNX"):
        to_onnx(nn.Linear(3, 1), torch.zeros(1, 4), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_skips_zeros_is_refused_in_words(tmp_path):
    model = sparse(cut(nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10)), 0.1), "torch", 0.5)
    with pytest.raises(ValueError, match=r"0 is a SparseLinear.*ONNX.*export\.compact.*dense model"):
        to_onnx(model, torch.randn(1, 64), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"the model is a SparseLinear"):
        to_onnx(model[0], torch.randn(1, 64), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match="to_onnx needs onnx and onnxscript: pip install onnx onnxscript"
    ):
        to_onnx(nn.Linear(1, 1), torch.zeros(1, 1), tmp_path / "a.onnx")
