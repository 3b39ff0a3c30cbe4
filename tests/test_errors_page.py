"""hf_sdp/ERRORS.md has every error that the package raises, and no other."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_sdp"
PAGE = PACKAGE / "ERRORS.md"
ON_THE_PAGE = {"SDPConfigError", "SDPStateError", "CommandError", "UsageError", "ValueError", "fail"}
"""What is made with a message for users; ``fail`` is that of click's types."""
OF_ITS_OWN_ACCORD = {
    # Asserted: never without a fault of hf_sdp's own.
    "AssertionError",
    # Caught within, where they become a reason in another message, or a finding of `hf-sdp models`.
    "CannotCut", "NotASum", "Differs", "FileNotFoundError", "KeyError", "OSError", "RuntimeError", "TimeoutError",
    "UnpicklingError",
    # What Python asks of __getattr__, and the ends of processes.
    "AttributeError", "SystemExit",
    # The error of a worker's process, told by its parent.
    "WorkerError",
    # Made elsewhere, and there on the page; so are those that private functions make.
    "raised_by_all", "error",
}  # fmt: skip


def template(node: ast.AST) -> str:
    """A message with … for what is known only when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def name_of(function: ast.AST) -> str:
    """``click.UsageError`` is ``UsageError``."""
    return ast.unparse(function).rpartition(".")[2]


@functools.cache
def all_nodes() -> list[tuple[str, ast.AST]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(str(file.relative_to(PACKAGE)), node) for file in files for node in ast.walk(ast.parse(file.read_text()))]


def nodes(*kinds: type) -> Iterator[tuple[str, ast.AST]]:
    """With their place in the code."""
    return ((f"{file}:{node.lineno}", node) for file, node in all_nodes() if isinstance(node, kinds))


def raised() -> dict[str, str]:
    """Where an error is made -> its message. Left out are those without words of their own, which pass on another's."""
    found = {}
    for place, call in nodes(ast.Call):
        if name_of(call.func) in ON_THE_PAGE and call.args:
            message = template(call.args[0])
            if re.search("[a-z]{3}", message.removeprefix("rank ")):
                found[place] = message
    return found


def beginnings() -> list[str]:
    """The messages of the page's tables: in backquotes, at the begin of a row or after a line break."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [text for row in rows for text in re.findall(r"(?:^\| |<br>)`(.+?)`(?=<br>| \|)", row)]


def begins(message: str, known: list[str]) -> bool:
    return any(message.startswith(beginning) for beginning in known)


def test_every_error_has_a_row():
    known = beginnings()
    assert len(known) > 200 and all(re.search("[a-zA-Z]{3}", beginning) for beginning in known)
    assert [f"{place}: {message}" for place, message in raised().items() if not begins(message, known)] == []


def test_every_row_has_an_error():
    messages = {template(node) for _, node in nodes(ast.JoinedStr, ast.Constant)}
    assert [text for text in beginnings() if not any(begins(message, [text]) for message in messages)] == []


def test_no_error_of_another_class_is_for_users():
    others = {}
    for place, node in nodes(ast.Raise):
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if error is None or name_of(error).startswith("_"):
            continue
        if name_of(error) not in ON_THE_PAGE | OF_ITS_OWN_ACCORD:
            others[place] = ast.unparse(node)
    assert others == {}
