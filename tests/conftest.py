import pytest
import workers


@pytest.fixture(autouse=True, scope="session")
def _stop_workers():
    yield
    workers.stop_all()
