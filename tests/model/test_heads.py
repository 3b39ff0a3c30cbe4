"""Models with other heads than a language model's, and models that see: the gradients of a subnetwork are right."""

import pytest

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.support.check import check, learn
from hf_sdp.bench.support.models import tiny_model
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.plan.plan import Plan
from tests.support.images import CONFIGS, TASK, text_and_image

SEQUENCES, TOKENS, ANSWERS = "sequence classification", "token classification", "question answering"
SHORT = {("llama", SEQUENCES, 2), ("bert", ANSWERS, 2)}
HEADS = [
    ("llama", SEQUENCES, 2),
    ("llama", SEQUENCES, 1),  # a reward
    *((name, SEQUENCES, 2) for name in ("bart", "bert", "gpt2", "mixtral", "modernbert", "qwen3", "t5")),
    *((name, TOKENS, 2) for name in ("bert", "llama")),
    *((name, ANSWERS, 2) for name in ("bart", "bert", "llama")),
]
LEVELS = {
    f"{level}, {masking}": dict(level=level, masking=masking)
    for level in ("block", "neuron")
    for masking in ("forward", "backward")
}


def short(case: tuple, chosen) -> pytest.param:
    return pytest.param(*case, marks=() if case in chosen else pytest.mark.long)


def is_shared(plan: Plan, name: str) -> bool:
    return all(s.holders == plan.everyone for s in plan.slices[name])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("model_type", "task", "num_labels"), [short(case, SHORT) for case in HEADS])
def test_gradients_equal_those_of_the_dense_model(model_type, task, num_labels, level):
    config = tiny_config(model_type, num_labels=num_labels)
    plan = check(config, task, SDPConfig(**LEVELS[level]))
    head = [name for name in plan.shapes if name.startswith(("score", "classifier", "classification_head", "qa"))]
    assert head and all(is_shared(plan, name) for name in head)
    assert any(not is_shared(plan, name) for name in plan.shapes)


@pytest.mark.parametrize("level", [short((level,), {("block, forward",)}) for level in LEVELS])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_sees_learns_from_images_and_is_shared(model_type, level):
    config, batch = tiny_config(model_type, **CONFIGS[model_type]), text_and_image(model_type)
    gradients = learn(tiny_model(config, TASK), batch).gradients
    plan = check(config, TASK, SDPConfig(**LEVELS[level]), batch=batch)
    seeing = [name for name in plan.shapes if "visual" in name or "vision" in name]
    assert sum(float(gradients[name].norm()) > 0 for name in seeing if name in gradients) > len(seeing) / 2
    assert all(is_shared(plan, name) for name in seeing)
    assert plan == make_plan(config, SDPConfig(**LEVELS[level]), 2)
    assert plan.modules and all("language_model" in module.name for module in plan.modules)
