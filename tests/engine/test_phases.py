"""A coverage schedule: N workers against N virtual ones, through the boundaries."""

from itertools import product

import pytest

from hf_sdp.bench.boundary import cross
from tests.support.oracle import OPTIMIZERS, compare
from tests.support.types import MODELS
from tests.support.workers import run_workers

GROWS = [(0.0, 0.5), (0.5, 1.0)]
SCHEDULES = {
    "three phases": dict(coverage_schedule=[(0.0, 0.25), (0.3, 0.75), (0.7, 1.0)]),  # one part, several, one
    "forward, then backward": dict(coverage_schedule=[(0.0, 0.5), (0.5, (dict(coverage=0.5, masking="backward")))]),
    "backward, then forward": dict(masking="backward", coverage_schedule=[(0.0, 0.5), "0.5:0.5:masking=forward"]),
    "linear, then all": dict(depth_profile="linear", coverage_schedule=GROWS),
    "uniform, then linear": dict(coverage_schedule=["0:0.5", "0.5:0.5:depth_profile=linear"]),
    "other level": dict(level="neuron", coverage_schedule=["0:0.5", "0.5:0.5:level=block"]),
    "shrinks": dict(coverage_schedule=[(0.0, 1.0), (0.5, 0.5)]),
    "checkpointing": dict(coverage_schedule=["0:0.5", "0.5:1:gradient_checkpointing=true"]),
}


def chosen(cases, short) -> list:
    """All cases; those that are not in ``short`` are long."""
    return [pytest.param(*case, marks=() if case in short else pytest.mark.long) for case in cases]


LEVELS = ("neuron", "block")


@pytest.mark.parametrize(
    ("level", "optimizer"), chosen(product(LEVELS, OPTIMIZERS), [("neuron", "adamw"), ("block", "two groups")])
)
def test_workers_equal_the_oracle_through_a_boundary(level, optimizer):
    compare(dict(level=level, coverage_schedule=GROWS), optimizer=optimizer, steps=8)


@pytest.mark.parametrize(
    ("level", "schedule"), chosen(product(LEVELS, SCHEDULES), [("neuron", "three phases"), ("block", "other level")])
)
def test_phases_differ_in_anything(level, schedule):
    compare(dict(level=level) | SCHEDULES[schedule], dict(num_hidden_layers=4), optimizer="adamw", steps=8)


SHARDINGS = {"none": dict(sharding="none"), "reshard": dict(reshard_after_forward=True)}


@pytest.mark.parametrize(("level", "sharding"), chosen(product(LEVELS, SHARDINGS), [("block", "none")]))
def test_shardings_and_accumulation(level, sharding):
    config = dict(level=level, coverage_schedule=GROWS) | SHARDINGS[sharding]
    compare(config, optimizer="adamw", accumulation=3, steps=6)


@pytest.mark.parametrize("level", [pytest.param("neuron", marks=pytest.mark.long), "block"])
def test_replicas_and_tied_weights(level):
    config = dict(level=level, num_subnetworks=2, coverage_schedule=GROWS)
    compare(config, dict(tie_word_embeddings=True), oracle=dict(simulate=2), steps=6)


OTHERS = {
    "gpt2": MODELS["gpt2"],
    "mixtral": MODELS["mixtral"],
    "t5": MODELS["t5"],
    "resnet": dict(task="image classification", model_type="resnet"),
    "lora": dict(lora=dict(r=4), num_hidden_layers=4),
    "frozen": {},
}


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model", OTHERS)
def test_other_models(model, level):
    schedule = ["0:0.5", "0.3:0.5:masking=backward", "0.7:1"]
    frozen = ("model.embed_tokens", "model.layers.0.mlp") if model == "frozen" else ()
    compare(dict(level=level, coverage_schedule=schedule), OTHERS[model], steps=6, frozen=frozen)


SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8)


@pytest.mark.parametrize(("sharding", "grows"), [("full", 1), pytest.param("none", 2, marks=pytest.mark.long)])
def test_memory_at_a_boundary_is_what_is_stored_and_one_parameter(sharding, grows):
    """Nothing of the phase before waits for the garbage collector."""
    sdp = dict(sharding=sharding, coverage_schedule=GROWS)
    largest = 4 * SIZES["vocab_size"] * SIZES["hidden_size"]
    for crossing in run_workers(cross, sdp, SIZES, world_size=4):
        assert crossing.before > 4 * largest and crossing.sent > largest
        sent_and_received = 3 * largest  # of one parameter, and its memory before the old one is freed
        assert crossing.peak <= max(crossing.before, crossing.after) + sent_and_received, crossing
        assert crossing.after <= grows * crossing.before + sent_and_received, crossing
