"""What import-linter does not see of the contract in pyproject.toml.

It knows torch, but no submodule of it, and it looks for circles between siblings, not between a room and its modules.
"""

import ast
import re
from pathlib import Path

import grimp
import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def imports() -> nx.DiGraph:
    """An arrow from every module of hf_sdp to every module that it imports, also inside functions."""
    graph = grimp.build_graph("hf_sdp", exclude_type_checking_imports=True, cache_dir=None)
    arrows = nx.DiGraph()
    arrows.add_nodes_from(graph.modules)
    for module in graph.modules:
        arrows.add_edges_from((module, imported) for imported in graph.find_modules_directly_imported_by(module))
    return arrows


def test_no_module_is_in_a_circle_of_imports(imports):
    circles = [sorted(circle) for circle in nx.strongly_connected_components(imports) if len(circle) > 1]
    assert circles == []


def test_plan_imports_no_torch_distributed(imports):
    plan = {module for module in imports if module.startswith("hf_sdp.plan.")}
    assert plan
    reached = plan.union(*(nx.descendants(imports, module) for module in plan))
    guilty = {module: names for module in reached if (names := _names_of_torch_distributed(module))}
    assert guilty == {}


def test_the_check_of_names_sees_every_way_to_torch_distributed():
    for text in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "import torch\ndef f():\n    torch.distributed.barrier()",
    ):
        assert _distributed_in(ast.parse(text)), text
    assert not _distributed_in(ast.parse("import torch\nfrom torch import nn\ntorch.ones(1)"))


def _names_of_torch_distributed(module: str) -> list[str]:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _distributed_in(ast.parse(path.read_text()))


def _distributed_in(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if name.startswith("torch.distributed")]


def test_the_table_of_attacks_names_tests_that_are_there():
    tests = Path(__file__).parent
    named = set(re.findall(r"`([a-z_/]+\.py)`", (tests / "attack" / "README.md").read_text()))
    assert named and not [name for name in named if not (tests / name).is_file()]
