import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers' server

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.support")  # so that its assertions show values as those of the tests do

from tests.support import workers  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _stop_workers():
    yield
    workers.stop_all()
