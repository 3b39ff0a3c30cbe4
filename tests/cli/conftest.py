"""The command, called in this process."""

import pytest

from hf_sdp.cli import main
from tests.support.models import tiny_config


@pytest.fixture
def run(capsys):
    """``run("plan", ...)`` -> exit code, stdout, stderr."""

    def call(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tmp_path):
    tiny_config().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
