import pytest

from lightning_rigl.compute import crossover
from lightning_rigl.kernels import library


@pytest.fixture(params=["torch", "native"])
def backend(request):
    if request.param == "native" and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    return request.param


@pytest.fixture
def any_size(monkeypatch):
    """Layers of any size and density compute sparsely."""
    monkeypatch.setattr(crossover, "SMALLEST", {"torch": 0, "native": 0})
    monkeypatch.setattr(crossover, "DENSEST", {"torch": 1.0, "native": 1.0})
