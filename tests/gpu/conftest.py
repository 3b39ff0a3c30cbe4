"""Real workers over NCCL on CUDA: four of them on however many GPUs there are. Without a GPU all is skipped.

Written without one: none of these tests has run on a GPU yet.
"""

from pathlib import Path

import pytest
import torch

from tests.support.workers import compute_exactly

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _exact():
    compute_exactly()
