"""Values of ``SDPConfig``, ranks, worlds and numbers of subnetworks that are none."""

import numpy as np
import pytest
import torch

from hf_sdp import SDPConfig, Workload, make_plan, make_plans, patch_model
from hf_sdp.config import MAX_WORLD
from tests.support.models import tiny_config, tiny_model
from tests.support.refusal import assert_refused

NAN, INF = float("nan"), float("inf")
WORK = dict(workload=Workload(batch=1, sequence=8))
FIELDS = {
    "level": [None, 1, "", "Neuron", ["neuron"], b"neuron", np.array(["neuron"]), "neuron "],
    "masking": [None, True, "none", ("forward",)],
    "coverage": [
        None, "0.5", 0, -0.5, 1.0000001, NAN, INF, 10**30, True, [], [0.5, NAN], [0.5, None], [True, False], {},
        {"0": 0.5}, b"\x01", torch.tensor(0.5), np.array([0.5, 0.5]), [[0.5]], 0.5 + 0j,
    ],
    "balance": [None, 0, "both"],
    "depth_profile": [None, "cosine", 1],
    "sharding": [None, False, "zero3"],
    "block_granularity": [None, "head", 3],
    "evaluate": [None, True, "all"],
    "min_replication": [None, 0, -1, 1.0, True, "1", NAN],
    "num_subnetworks": [0, -4, 2.0, True, "4", MAX_WORLD + 1, 10**30],
    "simulate": [0, -4, 4.0, True, "4", MAX_WORLD + 1],
    "reshard_after_forward": [None, "yes", "false", 1, 0],
    "evaluation_timeout_s": [None, "600", 0, -1.0, NAN, INF, True],
    "seed": [None, "0", 0.0, True, NAN],
    "always_held": [None, 0, "0", [0.0], [True], b"\x00", [None], {0}],
    "param_dtype": ["bf16", torch.bfloat16, 32, True],
    "reduce_dtype": ["fp32", torch.float32, ""],
    "workload": [1, "batch=1", "batch=1,sequence=8,colour=red", {"batch": 1}, ["batch=1,sequence=8"]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values], ids=str
)
def test_fields(field, value):
    assert_refused(field, lambda: SDPConfig(**{field: value}))


@pytest.mark.parametrize(
    "value", [[NAN, 1], [INF, 1], [0, 1], [-1, 1], [], ["1"], [True, 1], 8, "8", {}, [None], b"\x01\x01"], ids=str
)
def test_memory(value):
    assert_refused("memory_gib", lambda: SDPConfig(memory_gib=value, **WORK))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("batch", "sequence")
        for value in (0, -1, 1.0, True, "4", None, NAN, 2**20 + 1, 10**20)
    ]
    + [("dtype", "fp8"), ("dtype", None), ("dtype", ["fp32"]), ("param_dtype", 32), ("optimizer", "lion")]
    + [("gradient_checkpointing", "yes"), ("gradient_checkpointing", 1)],
    ids=str,
)
def test_workloads(field, value):
    assert_refused(field, lambda: Workload(**{"batch": 1, "sequence": 8, field: value}))


def test_unknown_fields_and_positions_are_type_errors_of_the_dataclass():
    for call in (lambda: SDPConfig(color="red"), lambda: SDPConfig("block"), lambda: Workload(batch=1)):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [
        (None, 4), (0, None), (-1, 4), (4, 4), (0, 0), (0, -1), (0, 1), ("0", 4), (0, "4"), (0.0, 4), (0, 4.0),
        (False, 4), (0, True), (0, 10**12), (NAN, 4), (torch.tensor(0), 4), ([0], 4),
    ],
    ids=str,
)  # fmt: skip
def test_ranks_and_worlds(rank, world_size):
    model = tiny_model()
    message = "rank|world|workers|No process group"
    assert_refused(message, lambda: patch_model(model, SDPConfig(), rank=rank, world_size=world_size), model)


@pytest.mark.parametrize(
    "number", [0, -1, 4.0, "4", None, True, NAN, MAX_WORLD + 1, 10**12, [4], torch.tensor(4)], ids=str
)
def test_numbers_of_subnetworks(number):
    assert_refused("num_subnetworks", lambda: make_plan(tiny_config(), SDPConfig(), number))


@pytest.mark.parametrize("config", [None, {}, "block", SDPConfig, dict(level="block"), 0.5], ids=str)
def test_configs_of_another_type(config):
    model = tiny_model()
    assert_refused("must be an SDPConfig", lambda: patch_model(model, config, rank=0, world_size=4), model)
    for make in (make_plan, make_plans):
        assert_refused("must be an SDPConfig", lambda make=make: make(model, config, 4), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coverage=0.3), "Nearest coverage"),
        (dict(coverage=1e-9), "Nearest coverage"),
        (dict(coverage=[0.5, 0.5]), "lists 2 subnetworks.*there are 4"),
        (dict(coverage=[0.5] * 5), "lists 5 subnetworks"),
        (dict(coverage=[0.01] * 4), "less than one unit|Nearest|holds"),
        (dict(num_subnetworks=3), "does not divide"),
        (dict(num_subnetworks=8), "does not divide"),
        (dict(min_replication=5), "min_replication=5"),
        (dict(min_replication=10**30), "min_replication=1000"),
        (dict(always_held=[4]), "no layer 4"),
        (dict(always_held=[-5]), "no layer -5"),
        (dict(always_held=[10**30]), "no layer 1000"),
        (dict(always_held=[0, 1, 2, 3]), "nothing is left"),
        (dict(always_held=range(4)), "nothing is left"),
        (dict(memory_gib=[1, 1], **WORK), "memory_gib lists 2"),
        (dict(memory_gib=[1e-9] * 4, **WORK), "too little"),
        (dict(memory_gib=[1e-300] * 4, **WORK), "too little"),
        (dict(simulate=2), "simulate=2"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_world_or_the_model(options, message):
    model = tiny_model()
    assert_refused(message, lambda: patch_model(model, SDPConfig(**options), rank=0, world_size=4), model)


@pytest.mark.parametrize("level", ["neuron", "block"])
@pytest.mark.parametrize(
    "options",
    [
        dict(seed=-1), dict(seed=10**30), dict(seed=-(10**30)), dict(coverage=1), dict(coverage=np.float32(0.5)),
        dict(coverage=(0.5, 0.5, 0.5, 0.5)), dict(coverage=[1, 0.5, 0.5, 1]), dict(always_held=(0, 0, -4)),
        dict(evaluation_timeout_s=1), dict(memory_gib=[1e9] * 4, **WORK),
    dict(coverage=[0.75, 0.5, 0.5, 0.25], seed=10**30),
    ],
    ids=str,
)  # fmt: skip
def test_unusual_values_that_are_right(level, options):
    """Every unit has a holder, nobody holds nothing, and a plan is the same when it is made again."""
    config = SDPConfig(level=level, **options)
    plan = make_plan(tiny_config(), config, 4)
    assert plan.hash == make_plan(tiny_model(), config, 4).hash
    assert all(holders and set(holders) <= {0, 1, 2, 3} for units in plan.unit_holders.values() for holders in units)
    assert all(plan.numel(worker) > plan.shared_numel for worker in range(4))


def test_the_largest_world_is_planned():
    plan = make_plan(tiny_config(), SDPConfig(), MAX_WORLD)
    assert plan.num_subnetworks == MAX_WORLD and plan.coverage == pytest.approx(0.5)
