"""What the command refuses."""

import re


def refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("hf-sdp: ")
    assert re.search(message, err), err
