"""The support table: types of different structure, and that none of them can end the run."""

import re

import pytest

from hf_sdp import SDPConfig, SDPConfigError
from hf_sdp.bench.support import check as checks
from hf_sdp.bench.support.page import cell, counts, markdown, ordered
from hf_sdp.bench.support.table import MASKINGS, Row, reason_of, rows, tried, without_name
from hf_sdp.bench.support.tiny import tiny_config

SAMPLE = {
    ("bert", "masked"): "",  # norms after the sums
    ("deberta", "masked"): "attention held whole",  # the same, with norms of several operations
    ("deepseek_v3", "causal"): "",  # latent attention; dense layers, then experts
    ("falcon", "causal"): "attention held whole",  # one norm for both branches, which are added in place
    ("funnel", "masked"): "all hold .*attention",  # a norm after the sum, within the attention
    ("gemma4_text", "causal"): "computes is used outside of it",  # keys and values that later layers use
    ("gpt2", "causal"): "",  # Conv1D, fused projections
    ("hrm_text", "causal"): "",  # each layer is called several times
    ("llama", "causal"): "",
    ("mamba", "causal"): "",  # weights that are read without a call
    ("nllb-moe", "sequence to sequence"): "experts held whole",  # experts by name; cross-attention
    ("openai-gpt", "causal"): "all hold .*attn",  # lists instead of tuples
    ("t5", "sequence to sequence"): "all hold .*SelfAttention",  # the first layer's position bias is used by all
}
"""Model type, task -> what is held by all workers."""
_SHORT = {"deepseek_v3", "falcon", "funnel", "gpt2", "mamba", "t5"}


@pytest.mark.parametrize(
    ("model_type", "task"),
    [pytest.param(*key, marks=() if key[0] in _SHORT else pytest.mark.long) for key in SAMPLE],
    ids=lambda text: text.replace(" ", "-"),
)
def test_what_works_at_block_level(model_type, task):
    row = tried(model_type, task)
    assert row.reasons["sub-blocks"] == row.reasons["layers"] == dict.fromkeys(MASKINGS, "")
    note = SAMPLE[model_type, task]
    assert re.search(note, row.notes) and bool(row.notes) == bool(note), row.notes


def test_a_stream_that_is_no_sum_is_refused_with_the_reason():
    """Several streams that are mixed: nothing can be left out, but what is added to them can be cut."""
    row = tried("deepseek_v4", "causal")
    for column in ("sub-blocks", "layers"):
        assert "no operand of a sum is what the others are computed from" in cell(row, column)
    assert cell(row, "neurons") == "yes"


@pytest.mark.parametrize("options", [dict(), dict(block_granularity="layer")], ids=str)
def test_the_check_finds_what_is_not_left_out(options, monkeypatch):
    monkeypatch.setattr(checks, "leave_out", lambda dense, plan, rank: None)
    with pytest.raises(checks.Differs, match="rank 0"):
        checks.check(tiny_config("llama"), "causal", SDPConfig(level="block", **options))


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_check_finds_gradients_that_are_scaled_otherwise(masking, monkeypatch):
    place = "simulation._scaled" if masking == "forward" else "held_blocks.ScaledGradient.backward"
    wrong = (lambda grad, scale: grad) if masking == "forward" else (lambda ctx, grad: (grad, None))
    monkeypatch.setattr(f"hf_sdp.model.{place}", wrong)
    with pytest.raises(checks.Differs, match="rank 0, .*weight differs"):
        checks.check(tiny_config("llama"), "causal", SDPConfig(level="block", masking=masking))


def test_a_type_that_fails_or_takes_too_long_is_a_row():
    found = {row.model_type: row for row in rows([("nosuch", "causal"), ("bert", "causal")], processes=1, limit_s=60)}
    assert cell(found["nosuch"], "layers").startswith("not tried: no tiny model")
    assert cell(found["bert"], "layers") == "yes" and found["bert"].numel > 0
    (late,) = rows([("llama", "causal")], limit_s=0.01)
    assert "took longer than 0.01 s" in cell(late, "sub-blocks")


def of(forward: str, backward: str, task: str = "causal", name: str = "some") -> Row:
    columns = ("sub-blocks", "layers", "neurons")
    return Row(name, task, {column: dict(forward=forward, backward=backward) for column in columns}, notes="a | b")


def test_the_page():
    found = [of("", "", "masked"), of("too few: 1", "too few: 1", name="z"), of("", "no", name="a")]
    page = markdown(ordered(found, ["causal", "masked"]), "5.0")
    assert '`hf-sdp models --task "causal" --task "masked" --output' in page  # what made it
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = "forward only [1] | " * 3
    assert lines[2] == rf"| a | causal | {cells}a \| b |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| a", "| z", "| some"]
    assert page.endswith("\n1. no\n2. too few: 1\n")
    assert counts(found)[1:] == [
        ("masked", "1", "0", "1", "1", "1"), ("causal", "2", "0", "0", "0", "0"), ("all", "3", "0", "1", "1", "1"),
    ]  # fmt: skip


def test_the_page_has_each_reason_once():
    first, second, third = (of("x is read elsewhere", "x is read elsewhere", name=name) for name in "abc")
    first.notes = "5% of the layers is in no block; all hold x.* (2): x is read elsewhere; all hold y (1): it is; z"
    second.notes = "all hold x.* (1): it is; z; neurons: mixer held whole"
    third.reasons["layers"] = dict.fromkeys(MASKINGS, "not tried: it is; z")
    page = markdown([first, second, third], "5.0")
    no = "no [1] | no [1] | no [1]"
    assert [line for line in page.splitlines() if line.startswith(("| a", "| b", "| c"))][:3] == [
        rf"| a | causal | {no} | 5% of the layers is in no block; all hold x.\* (2) [1]; all hold y (1) [2] |",
        rf"| b | causal | {no} | all hold x.\* (1) [2]; neurons: mixer held whole |",
        r"| c | causal | no [1] | not tried [2] | no [1] | a \| b |",
    ]
    assert page.endswith("\n1. x is read elsewhere\n2. it is; z\n")


def test_what_is_not_found_is_said_without_the_remedy():
    message = "The residual blocks of X (model_type='x') cannot be found: on the meta device it raises E: no.. "
    remedy = "hf_sdp.register_family says what is not found (hf_sdp/FAMILIES.md)."
    assert reason_of(SDPConfigError(message + remedy)) == "not found: E: no"


def test_a_wrong_number_is_named_as_such():
    assert reason_of(checks.Differs("the loss differs")) == "wrong: the loss differs"
    assert reason_of(ValueError("two\nlines")) == "fails: ValueError: two lines"


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("x.0: no operand of a sum", "no operand of a sum"),
        ("x.0 returns more than is added", "returns more than is added"),
        ("what x.0 computes is used outside of it", "what it computes is used outside of it"),
        ("without x.0, x.1 x raises StopIteration", "without it, x.1 x raises StopIteration"),
        ("bias is read outside of x.0.", "bias is read outside of it"),
    ],
)
def test_a_reason_does_not_repeat_the_name_it_stands_behind(why, said):
    assert without_name(why, "x.0") == said
