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
    monkeypatch.setattr(crossover, "least_rows", lambda size, connections, rule: 1)
