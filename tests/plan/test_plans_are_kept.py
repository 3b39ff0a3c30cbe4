"""Plans stay what they are: a checkpoint's plan, and a run that is continued, depend on every bit of them."""

import pytest

from hf_sdp import SDPConfig, Workload, make_plan
from tests.support.models import tiny_config

STEP = Workload(batch=2, sequence=32)
LLAMA = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
)  # fmt: skip
PLANS = [  # changes of the model, options of SDPConfig, subnetworks, SHA-256 of the plan
    (
        {}, {}, 4,
        "5c0f1d6d67315ef4e28720ee8f0d0e525ed22e98f0e6cafe45a2c4897c3ff19e",
    ),
    (
        {}, dict(level="block"), 4,
        "b8c9c2e85d722e74d75c9deae86c7ef14054a6f50604913e8bf2a806a9643f4b",
    ),
    (
        {}, dict(masking="backward"), 4,
        "9a217a138e670343c4d6c4cbd60eca0e7de15dafaff63f31f4f2e03e94ebb4de",
    ),
    (
        {}, dict(level="block", masking="backward"), 8,
        "80925cb656f96d8afad8c5ed6248247493d72e99b2f88e55e509b13552efbed0",
    ),
    (
        {}, dict(coverage=0.75), 4,
        "3ce87d38d60786665671a447fa402e67941f381cf22f240359f8569c499a7d77",
    ),
    (
        {}, dict(coverage=0.25), 8,
        "cb4cdb598af9fb23af309761e0b1e5b9e8bc2522d838f556334afd3d0919c6c6",
    ),
    (
        {}, dict(coverage=1.0), 4,
        "4c69c912b5774793261b78e8b67a00f164234e329a34abc74e7de5765f655044",
    ),
    (
        {}, dict(seed=3), 8,
        "f426102a141e05a6f407f4973a5cdce6d0107ccf70e062aa87913a169ed699f6",
    ),
    (
        {}, dict(level="block", block_granularity="layer"), 4,
        "833a523cae9dabcdfe96bab1ac8e9cc720829aefed4d0bd41d0cadc978d1f6ef",
    ),
    (
        dict(attention_bias=True, mlp_bias=True), dict(coverage=0.75), 4,
        "72d105fc1afbdd32248b9cca8d1a5900a45242a7b4cf57b46737499dd5ab6e6c",
    ),
    (
        dict(tie_word_embeddings=True), {}, 6,
        "e7f03cecbc129271a3c07795513404de621b8e19b988007ddf1bd0d81718beb3",
    ),
    (
        {}, dict(coverage=[0.75, 0.5, 0.5, 0.25]), 4,
        "f433f313775ab412ff9c3cc154a938bf1f3cfb6f9d814c049b2c65191ee94a7a",
    ),
    (
        {}, dict(coverage=[0.75, 0.5, 0.5, 0.25], level="block"), 4,
        "ed90769e8136d0d588a70735816e2a43480c8b1e6cc1ed107c1748d0270341c9",
    ),
    (
        {}, dict(depth_profile="linear"), 8,
        "db4ba99d420140558182f49e1dbe12f853264227a686fa120a428f0fa4ee3b17",
    ),
    (
        {}, dict(depth_profile="linear", level="block"), 8,
        "54cd533d0fc9de07832fddc3b1b25cd74ce30d81d836deecb2649064bce4b7f2",
    ),
    (
        {}, dict(always_held=[0, -1]), 4,
        "293aeb88ff6e9f3960ad790ed97ecfcdcab637e5f8d9f85a84b13d6c9ddeb7fb",
    ),
    (
        {}, dict(always_held=[0], level="block", coverage=0.75), 4,
        "4fc11e9b234265e411bcfdff2c0708efabe01c395d0951dc106a5ba44ca99155",
    ),
    (
        {}, dict(balance="compute", workload=STEP, level="block"), 4,
        "2c3543589fa3389420c370ca6b8dde01a79e739f0c060c243c638917f5919c90",
    ),
    (
        {}, dict(memory_gib=[0.01, 0.003, 0.0025, 0.002], workload=STEP), 4,
        "ff1d9c3a6bb691d9ce26d2be3d1dc224d56a0f27913d405653a5c67e53667b94",
    ),
    (
        dict(num_hidden_layers=12, intermediate_size=1376), dict(coverage=0.375, level="block"), 16,
        "afd212779a6c936f537d193a182d617b70cd52553c12fead5149587f43ac5197",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "num_subnetworks", "expected"),
    [pytest.param(*plan, marks=pytest.mark.long if "memory_gib" in plan[1] else ()) for plan in PLANS],
)
def test_the_hash_of_a_plan_is_the_same_in_every_version(model, options, num_subnetworks, expected):
    plan = make_plan(tiny_config(**{**LLAMA, **model}), SDPConfig(**options), num_subnetworks)
    assert plan.hash == expected
