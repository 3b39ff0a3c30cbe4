"""The picture of a plan."""

import struct

import numpy as np
import pytest

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.picture import DPI, draw_plan
from hf_sdp.plan.plan import Plan
from hf_sdp.plan.units import MaskableModule
from tests.support.models import tiny_config
from tests.support.plans import hand_made


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    ("layers", "subnetworks", "options"),
    [(4, 8, dict(level="block")), (4, 4, dict(level="neuron", coverage=0.75)), (24, 128, dict(level="block"))],
    ids=str,
)
def test_a_picture_has_a_size_that_follows_layers_and_subnetworks(tmp_path, layers, subnetworks, options):
    plan = make_plan(tiny_config(num_hidden_layers=layers), SDPConfig(**options), subnetworks)
    draw_plan(plan, tmp_path / "plan.png")
    inches = 2 + 2 * min(max(0.3 * subnetworks, 2.5), 6), max(0.22 * layers, 3)
    assert png_size(tmp_path / "plan.png") == tuple(int(DPI * inch) for inch in inches)


def test_cells_of_the_picture_are_those_of_the_plan(tmp_path, monkeypatch):
    """Read back from the axes: a cell is filled where the subnetwork holds the unit."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plan = hand_made(4, (0, 1), (1, 2, 3), (0, 3))
    draw_plan(plan, tmp_path / "plan.svg")
    (panel,) = drawn[0].axes
    (mesh,) = [c for c in panel.collections if hasattr(c, "get_array") and type(c).__name__ == "QuadMesh"]
    filled = ~np.ma.getmaskarray(np.ma.masked_invalid(mesh.get_array())).reshape(3, 4)
    assert filled.tolist() == [[True, True, False, False], [False, True, True, True], [True, False, False, True]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["2 holders", "3 holders"]


def test_a_picture_of_uneven_widths(tmp_path):
    """Modules of different numbers of units stack without gaps."""
    plan = make_plan(tiny_config(), SDPConfig(), 2)
    module = plan.modules[1]
    other = MaskableModule(module.name, module.kind, module.layer, 1, module.dims)
    changed = Plan.of_units(
        level=plan.level, masking=plan.masking, always_held=(), shapes=plan.shapes, num_subnetworks=2,
        modules=tuple(other if m is module else m for m in plan.modules),
        unit_holders={**plan.unit_holders, module.name: ((0, 1),)},
    )  # fmt: skip
    draw_plan(changed, tmp_path / "plan.SVG")
    assert "</svg>" in (tmp_path / "plan.SVG").read_text()
