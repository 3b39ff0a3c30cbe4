"""What the quality tests share."""

import pytest


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says {i * i % 97} and {i % 13} more words\n" for i in range(8000)))
    return str(path)
