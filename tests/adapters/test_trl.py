"""TRL's trainers on models with adapters. DPO's reference is the model with its adapters off, or with copies of them.

The three ways: the model with adapters is patched, the callback patches it, or the trainer also makes the adapters.
"""

import math

import pytest

from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, SDPStateError, patch_model
from tests.support.models import VOCAB, tiny_model, with_adapters
from tests.support.trainer import losses_of
from tests.support.trl import ARGUMENTS, rows, tokenizer
from tests.support.workers import run_workers

pytest.importorskip("trl")
pytest.importorskip("peft")

BETA = 0.1  # DPO's default


def dense(kind: str):
    if kind != "reward":
        return tiny_model()
    sizes = dict(vocab_size=VOCAB, num_labels=1, pad_token_id=1)
    return tiny_model(task="sequence classification", model_type="llama", **sizes)


def lora(kind: str) -> dict:
    return dict(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    )


def make_trainer(kind: str, folder, way: str, sdp: dict | None, arguments: dict | None = None, model=None, **other):
    other = {"train_dataset": rows(kind, 64, 0), "eval_dataset": rows(kind, 12, 1), **other}
    import trl
    from peft import LoraConfig

    prefix = {"sft": "SFT", "dpo": "DPO", "reward": "Reward"}[kind]
    args = getattr(trl, f"{prefix}Config")(output_dir=str(folder), **{**ARGUMENTS, **(arguments or {})})
    if way == "peft_config":
        model, other["peft_config"] = dense(kind), LoraConfig(**lora(kind))
    elif model is None:
        model = with_adapters(dense(kind), **lora(kind))
    if sdp is not None:
        if way == "patched":
            patch_model(model, SDPConfig(**sdp))
        other["callbacks"] = [SDPCallback(None if way == "patched" else SDPConfig(**sdp))]
    return getattr(trl, f"{prefix}Trainer")(model=model, args=args, processing_class=tokenizer(), **other)


def references(log_history) -> list[float]:
    """Log-probabilities by the reference, of the rows of each step."""
    kinds = [(f"logps/{kind}", f"rewards/{kind}") for kind in ("chosen", "rejected")]
    return [entry[own] - entry[reward] / BETA for entry in log_history for own, reward in kinds if own in entry]


def train(kind: str, folder, way: str, sdp: dict | None, arguments: dict | None = None):
    trainer = make_trainer(kind, folder, way, sdp, arguments)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return losses_of(trainer.state.log_history), loss, references(trainer.state.log_history)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("sft", "patched"),
        ("dpo", "callback"),
        pytest.param("sft", "peft_config", marks=pytest.mark.long),
        pytest.param("dpo", "peft_config", marks=pytest.mark.long),
    ],
)
def test_training_with_everything_held_equals_ddp(tmp_path, kind, way):
    ddp_losses, ddp_loss, _ = run_workers(train, kind, tmp_path / "ddp", way, None, world_size=2)[0]
    losses, loss, _ = run_workers(train, kind, tmp_path / "sdp", way, dict(coverage=1.0), world_size=2)[0]
    assert losses == pytest.approx(ddp_losses, rel=1e-4)
    assert loss == pytest.approx(ddp_loss, rel=1e-4)


@pytest.mark.parametrize("way", [pytest.param("callback", marks=pytest.mark.long), "peft_config"])
def test_the_reference_is_the_full_model(tmp_path, way):
    _, _, expected = run_workers(train, "dpo", tmp_path / "ddp", way, None, world_size=2)[0]
    for sdp in (dict(coverage=0.5), dict(level="block"), dict(masking="backward")):
        losses, _, found = run_workers(train, "dpo", tmp_path / str(sdp), way, sdp, world_size=2)[0]
        assert found == pytest.approx(expected, abs=1e-4)
        # What trains is compared with it: in the first step it is the same under backward masking only.
        assert (losses[0] == pytest.approx(math.log(2), abs=1e-5)) == (sdp.get("masking") == "backward")


def evaluate(kind: str, folder, way: str, sdp: dict):
    """Evaluation of the patched model, and that of the adapters it saves, on the dense model."""
    from peft import PeftModel

    trainer = make_trainer(kind, folder, way, sdp)
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]  # all wait for rank 0, which saves
    model = PeftModel.from_pretrained(dense(kind), folder)
    other = {}
    if kind == "dpo":
        other["ref_model"] = dense(kind)
        if way == "callback":
            other["ref_model"] = PeftModel.from_pretrained(dense(kind), folder / "ref").merge_and_unload()
    plain = make_trainer(kind, folder / "plain", "reloaded", None, model=model, **other)
    return loss, plain.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "way", "sdp"),
    [
        ("sft", "patched", dict(coverage=0.5)),
        pytest.param("sft", "callback", dict(level="block"), marks=pytest.mark.long),
        pytest.param("dpo", "callback", dict(level="block"), marks=pytest.mark.long),
        ("dpo", "peft_config", dict(coverage=0.5)),
        ("reward", "peft_config", dict(coverage=0.5)),
    ],
)
def test_evaluation_is_that_of_the_saved_adapters(tmp_path, kind, way, sdp):
    for loss, of_saved in run_workers(evaluate, kind, tmp_path, way, sdp, world_size=2):
        assert loss == pytest.approx(of_saved, rel=1e-6)


def precompute(folder, sdp: dict | None, has_reference: bool):
    from datasets import load_from_disk

    other = dict(train_dataset=load_from_disk(folder / "rows"), eval_dataset=None)
    if has_reference:
        other["ref_model"] = dense("dpo")
    trainer = make_trainer("dpo", folder, "peft_config", sdp, dict(precompute_ref_log_probs=True), **other)
    return list(trainer.train_dataset["ref_chosen_logps"])


def test_references_computed_before_training(tmp_path):
    found = []
    for sdp, has_reference in ((None, False), (dict(coverage=0.5), True), (dict(masking="backward"), False)):
        folder = tmp_path / str(len(found))
        rows("dpo", 8, 0).save_to_disk(folder / "rows")  # TRL keeps them with the rows: in a file, for all workers
        found.append(run_workers(precompute, folder, sdp, has_reference, world_size=2)[0])
    assert len(found[0]) == 8 and found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def make_refused(folder):
    with pytest.raises(SDPConfigError, match=r"add adapters before patch_model. TRL's DPOTrainer adds one"):
        make_trainer("dpo", folder, "patched", dict(coverage=0.5))
    with pytest.raises(SDPStateError, match="give its trainer a model of its own"):
        make_trainer("dpo", folder, "peft_config", dict(coverage=0.5), dict(precompute_ref_log_probs=True))


def test_what_trl_would_do_to_slices_is_refused(tmp_path):
    run_workers(make_refused, tmp_path, world_size=2)
