import pytest

from lightning_rigl.kernels import library


@pytest.fixture(scope="session")
def kernels():
    """The compiled kernels: from the cache, else compiled once for the whole run."""
    loaded = library.load()
    if loaded is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    return loaded
