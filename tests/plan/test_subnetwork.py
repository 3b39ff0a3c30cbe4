"""What a worker holds, by local names, of fused projections, bare parameters and buffers as of plain ones."""

import dataclasses

import pytest
import torch
from torch import nn

from hf_sdp import Plan, SDPConfig, make_plan
from hf_sdp.families import Structure
from hf_sdp.model.cut import cut
from hf_sdp.model.state import Cursor, Run
from hf_sdp.plan.groups import data_parallel_groups, sharding_groups
from hf_sdp.plan.placement import Placement, owners
from hf_sdp.plan.region import Region
from hf_sdp.plan.subnetwork import subnetwork_of
from hf_sdp.plan.units import MaskableModule
from tests.support.models import tiny_config

N = 4


class FusedMLP(nn.Module):
    """Gate and up in one projection, a bare parameter and a buffer for each neuron, and a shared bias."""

    def __init__(self, hidden: int = 6, neurons: int = 8):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * neurons, bias=False)
        self.scale = nn.Parameter(torch.rand(neurons))
        self.register_buffer("mean", torch.rand(neurons))
        self.down = nn.Linear(neurons, hidden)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down((torch.relu(gate) * up - self.mean) * self.scale)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": FusedMLP()})])

    def forward(self, x):
        return self.layers[0]["mlp"](self.embed(x))


STRUCTURE = Structure(layers=("layers.0",), outer=(("embed",),))


def plan_of(model: nn.Module, holders: list[tuple[int, ...]]) -> Plan:
    """Unit i, of four, is held by ``holders[i]``."""
    name = "layers.0.mlp"
    module = MaskableModule(
        name, "mlp", 0, 4,
        dims={f"{name}.gate_up.weight": 0, f"{name}.scale": 0, f"{name}.mean": 0, f"{name}.down.weight": 1},
        packed={f"{name}.gate_up.weight": ((0, 8), (8, 16))},
    )  # fmt: skip
    shapes = {n: tuple(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}
    return Plan.of_units(
        level="neuron", masking="forward", num_subnetworks=N, always_held=(), shapes=shapes, modules=(module,),
        unit_holders={name: holders},
    )  # fmt: skip


HOLDERS = {
    "one part each": [(0, 1), (0, 1), (2, 3), (2, 3)],
    "several parts": [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)],
}


@pytest.mark.parametrize("holders", HOLDERS.values(), ids=HOLDERS)
def test_a_cut_model_is_the_full_one_with_the_other_neurons_zeroed(holders):
    torch.manual_seed(0)
    full, x = Model(), torch.randn(3, 6)
    plan = plan_of(full, holders)
    for index in range(N):
        model, dense = Model(), Model()
        model.load_state_dict(full.state_dict())
        dense.load_state_dict(full.state_dict())
        with torch.no_grad():
            for s in plan.slices["layers.0.mlp.scale"]:
                if index not in s.holders:
                    dense.layers[0]["mlp"].scale[s.start : s.stop] = 0
        subnetwork = subnetwork_of(plan, index)
        cut(model, subnetwork, STRUCTURE, Run(Cursor(index), evaluates_full=False))
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {n: tuple(t.shape) for n, t in found.items()} == {
            n: tensor.region.shape for n, tensor in subnetwork.tensors.items()
        }
        for local_name, tensor in subnetwork.tensors.items():
            assert torch.equal(found[local_name], tensor.region.of(full.state_dict()[tensor.region.name]))
        torch.testing.assert_close(model(x), dense(x))  # other shapes are summed in another order


def test_slices_of_a_fused_projection_tile_it_with_two_for_each_unit():
    plan = plan_of(Model(), HOLDERS["one part each"])
    slices = plan.slices["layers.0.mlp.gate_up.weight"]
    assert [(s.start, s.stop) for s in slices] == [(2 * i, 2 * i + 2) for i in range(8)]
    assert [s.unit for s in slices] == [f"layers.0.mlp[{i}]" for i in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert plan.numel(0) + plan.numel(2) == plan.full_numel + plan.shared_numel
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.held_region("layers.0.mlp.gate_up.weight", 2).ranges[0] == ((4, 6), (6, 8), (12, 14), (14, 16))


@pytest.mark.parametrize("sharding", ["full", "none"])
@pytest.mark.parametrize("num_workers", [4, 8])
@pytest.mark.parametrize("holders", HOLDERS.values(), ids=HOLDERS)
def test_every_element_has_one_owner_who_holds_it(holders, num_workers, sharding):
    plan = plan_of(Model(), holders)
    placement = Placement(num_workers, N, sharding)
    for name, owned in owners(plan, placement).items():
        count = torch.zeros(plan.shapes[name])
        for rank, region in owned:
            for box, _ in region.views(torch.empty(region.shape)):
                count[tuple(slice(a, b) for a, b in box)] += 1
            tensors = subnetwork_of(plan, rank % N).tensors.values()
            stored = [placement.stored(t.region, t.holders, rank) for t in tensors if t.region.name == name]
            assert region in stored
        assert (count == 1).all()


def test_replicas_store_the_same_shards_and_the_world_shares_what_everyone_holds():
    """Eight workers, four subnetworks: worker w and w + 4 are replicas."""
    full, none = (Placement(8, 4, sharding) for sharding in ("full", "none"))
    assert full.mesh((1, 2)) == [[1, 2], [5, 6]]
    assert full.mesh((0, 1, 2, 3)) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert none.mesh((1, 2)) == [[1], [2], [5], [6]]
    assert full.place((1, 2), 6) == (1, 2) and none.place((1, 2), 6) == (0, 1)


def test_parts_of_a_module_come_in_sorted_order_of_their_holder_sets():
    plan = plan_of(Model(), [(2, 3), (0, 1), (2, 3), (0, 1)])
    assert [part.holders for part in plan.parts] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    starts = [part.regions["layers.0.mlp.scale"].ranges[0][0][0] for part in plan.parts]
    assert starts == [2, 6, 0, 4]  # of one holder set in the order of units


def test_where_some_worker_has_several_parts_all_add_the_shared_biases_after_them():
    """All workers gather the biases: one with a single part would else gather it before it reduces the bias."""
    plan = plan_of(Model(), [(0, 1), (0, 1), (0, 2), (0, 3)])
    for index in range(N):
        (module,) = subnetwork_of(plan, index).modules
        assert module.has_parts and module.biases[0].module == "layers.0.mlp.down.shared_bias"
    plan = plan_of(Model(), HOLDERS["one part each"])
    assert not any(subnetwork_of(plan, index).modules[0].has_parts for index in range(N))


@pytest.mark.parametrize("holders", HOLDERS.values(), ids=HOLDERS)
def test_groups_have_every_tensor_once_and_only_holders(holders):
    plan = plan_of(Model(), holders)
    for index in range(N):
        subnetwork = subnetwork_of(plan, index)
        groups = sharding_groups(subnetwork, STRUCTURE)
        names = [name for group in groups for name in group.tensors]
        assert sorted(names) == sorted(subnetwork.tensors)
        for group in groups:
            assert index in group.holders
            assert all(subnetwork.tensors[name].holders == group.holders for name in group.tensors)


def test_workers_have_common_groups_in_one_order():
    """Two workers come to the groups that they share in the same order: else their collectives would not meet."""
    config = tiny_config(num_hidden_layers=3, mlp_bias=True, attention_bias=True)
    layers = tuple(f"model.layers.{i}" for i in range(3))
    structure = Structure(layers, (("model.embed_tokens",), ("lm_head",)))
    for options in (dict(coverage=0.75), dict(level="block"), dict(coverage=[0.75, 0.5, 0.5, 0.25])):
        plan = make_plan(config, SDPConfig(**options), N)
        orders = []
        for index in range(N):
            groups = sharding_groups(subnetwork_of(plan, index), structure)
            tensors = {r.name: g.holders for g in groups for r in g.tensors.values()}
            orders.append([(tuple(sorted({r.name for r in g.tensors.values()})), g.holders) for g in groups])
            assert tensors.keys() == plan.held(index).keys()
        for a in range(N):
            for b in range(a):
                common = [[g for g in order if {a, b} <= set(g[1])] for order in (orders[a], orders[b])]
                assert common[0] == common[1]


def test_data_parallel_groups_are_layers_and_the_rest():
    shapes = {"embed.weight": (6, 6), "layers.0.mlp.scale": (8,)}
    layer, root = data_parallel_groups(STRUCTURE, shapes, 4)
    assert (layer.modules, list(layer.tensors)) == (("layers.0",), ["layers.0.mlp.scale"])
    assert (root.modules, list(root.tensors)) == (("",), ["embed.weight"])
    assert root.holders == (0, 1, 2, 3) and root.tensors["embed.weight"] == Region.whole("embed.weight", (6, 6))


def test_a_module_that_is_not_packed_is_written_as_before():
    plan = make_plan(tiny_config(), SDPConfig(), N)
    assert not any(name in plan.to_json() for name in ("packed", "members", "arguments", "switched"))
    fields = [f.name for f in dataclasses.fields(MaskableModule)]
    written = ["name", "kind", "layer", "num_units", "dims", "packed", "members", "sizes", "arguments", "switched"]
    assert fields == written
