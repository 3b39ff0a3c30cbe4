"""A schedule as users write it, and which step begins which phase."""

import pytest

from hf_sdp import SDPConfig, SDPConfigError, Workload
from hf_sdp.model.phases import Planned, Schedule
from hf_sdp.planner import make_plans
from hf_sdp.schedule import Phase, first_steps
from tests.support.models import tiny_config

GROWS = (Phase(0.0, 0.5), Phase(0.6, 1.0))


@pytest.mark.parametrize(
    "given",
    [
        [(0.0, 0.5), (0.6, 1.0)],
        ["0:0.5", " 0.6:1 "],
        "0:0.5,0.6:1",
        ["0:0.5,0.6:1"],  # --sdp_coverage_schedule 0:0.5,0.6:1
        [(0, dict(coverage=0.5)), dict(start=0.6, coverage=1.0)],
        list(GROWS),
    ],
    ids=str,
)
def test_one_schedule_in_all_forms(given):
    assert SDPConfig(coverage_schedule=given).coverage_schedule == GROWS


def test_options_of_a_phase_in_text():
    phase = Phase.parse("0.6:0.5:masking=backward:level=block:splits=2:gradient_checkpointing=true")
    assert phase == Phase(0.6, 0.5, level="block", masking="backward", splits=2, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, "must be a list such as"),
        (b"0:0.5", "must be a list such as"),
        ("", "'' is no phase"),
        ([], "must begin at 0"),
        ([(0.1, 0.5)], "must begin at 0"),
        ([(0, 0.25), (0.7, 0.5), (0.7, 1)], "each phase after the one before it"),
        ([(0, 0.25), (1.0, 0.5)], r"in \[0, 1\)"),
        ([(0, 0.5), (0.5, 0.5)], "from 0.5 is as the one before"),
        ([(0, 0.5), (0.5, True)], "must be a number, got True"),
        ([(0, 0.5), (0.5, 1.5)], "from 0.5: coverage must be in"),
        ([dict(start=0)], "each phase must have a coverage"),
        ([(0, dict(coverage=0.5, cover=1))], "is no phase"),
        ([3], "3 is no phase"),
        (["0"], "'0' is no phase"),
        (["0:half"], "'0:half' is no phase"),
        (["0:0.5:splits=0"], "splits must be a positive integer"),
        (["0:0.5:pieces=2"], "'pieces=2' is not understood"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_an_error_that_says_why(given, message):
    with pytest.raises(SDPConfigError, match=message):
        SDPConfig(coverage_schedule=given)


def test_a_phase_has_the_options_of_the_config_and_its_own():
    config = SDPConfig(level="block", block_granularity="layer", coverage_schedule=["0:0.5", "0.5:0.5:level=neuron"])
    (_, first), (_, second) = config.phases
    assert first == SDPConfig(level="block", block_granularity="layer", coverage=0.5)
    assert second == SDPConfig(coverage=0.5)


def test_without_a_schedule_the_one_phase_says_nothing_of_its_own():
    config = SDPConfig(coverage=[0.25, 0.75], level="block", masking="backward")
    ((phase, of_phase),) = config.phases
    assert of_phase is config and phase.start == 0 and phase.changes == {}


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase(0.0, 0.5), dict(batch=5)),
        (Phase(0.0, 0.5, splits=2), dict(batch=3)),  # pieces of 2 and 3 rows
        (Phase(0.0, 0.5, splits=8), dict(batch=1)),
        (Phase(0.0, 0.5, gradient_checkpointing=True), dict(batch=5, gradient_checkpointing=True)),
    ],
)
def test_what_a_worker_computes_at_a_time_is_the_largest_piece(phase, expected):
    assert phase.workload_of(Workload(batch=5, sequence=8)) == Workload(sequence=8, **expected)


def test_a_phase_keeps_the_checkpointing_of_the_workload():
    workload = Workload(batch=1, sequence=8, gradient_checkpointing=True)
    assert Phase(0.0, 0.5).workload_of(workload) == workload


@pytest.mark.parametrize(
    ("starts", "costs", "num_steps", "expected"),
    [
        ([0.0], [1.0], 5, [0]),
        ([0.0, 0.5], [1.0, 1.0], 8, [0, 4]),
        ([0.0, 0.3, 0.7], [2.0, 2.0, 2.0], 10, [0, 3, 7]),
        ([0.0, 0.5], [1.0, 2.0], 9, [0, 6]),  # half of what all cost: 6 steps of 1, 3 of 2
        ([0.0, 0.5], [1.0, 3.0], 100, [0, 75]),
        ([0.0, 0.25, 0.5], [1.0, 1.0, 4.0], 100, [0, 40, 80]),
    ],
)
def test_first_steps_are_at_shares_of_what_all_steps_cost(starts, costs, num_steps, expected):
    assert first_steps(starts, costs, num_steps) == expected


def test_flops_of_a_schedule_are_of_sequences_of_the_workload():
    """Attention is cut as the rest is, the head is not: the longer a sequence, the cheaper a subnetwork."""
    costs = []
    for workload in (None, Workload(batch=1, sequence=64), Workload(batch=1, sequence=4)):
        config = SDPConfig(coverage_schedule=GROWS, coverage_schedule_unit="flops", workload=workload)
        half, whole = make_plans(tiny_config(max_position_embeddings=64), config, 4)
        costs.append(half.cost / whole.cost)
    assert costs[0] == costs[1] < costs[2] < 1


def schedule_of(*phases: Phase) -> Schedule:
    config = SDPConfig(coverage_schedule=phases)
    return Schedule(config, tuple(Planned(phase, of_phase, None) for phase, of_phase in config.phases))


def test_a_phase_has_the_steps_from_its_first_to_the_next_ones():
    schedule = schedule_of(Phase(0.0, 0.25), Phase(0.3, 0.5), Phase(0.7, 1.0))
    assert [schedule.phase_at(step, 10) for step in range(11)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("num_steps", "lengths"), [(2, r"\[1, 0, 1\]"), (1, r"\[0, 1, 0\]")])
def test_a_phase_without_a_step_is_an_error(num_steps, lengths):
    schedule = schedule_of(Phase(0.0, 0.25), Phase(0.4, 0.5), Phase(0.6, 1.0))
    with pytest.raises(SDPConfigError, match=f"of {num_steps} training steps the phases get {lengths}"):
        schedule.phase_at(0, num_steps)
