"""The unmodified Trainer saves full models in the standard format."""

import json

import pytest
import torch

from hf_sdp import SDPCallback, SDPConfig, SDPStateError
from hf_sdp.hosts.trainer_checkpoint import kept_weights
from tests.support.models import tiny_model
from tests.support.trainer import Rows, make_trainer, norms_of
from tests.support.workers import run_workers


def train_and_save(folder, sdp, arguments=None, model=None):
    trainer = make_trainer(folder, sdp, arguments, model)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(f"{folder}/out")
    return metrics["eval_loss"], norms_of(trainer.state.log_history)


def full_loss(folder) -> float:
    """Evaluation loss of a checkpoint in plain transformers, one process, as the Trainer averages it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = Rows(24, seed=1)
    with torch.no_grad():
        losses = [
            model(input_ids=rows.ids[i : i + 1], labels=rows.ids[i : i + 1]).loss.item() for i in range(len(rows))
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_evaluation_is_of_the_full_model_and_the_checkpoint_is_standard(tmp_path, level, masking):
    results = run_workers(
        train_and_save, tmp_path, dict(level=level, masking=masking, coverage=0.5), None, {"tie_word_embeddings": True}
    )
    assert len({json.dumps(r) for r in results}) == 1  # loss and norms are the same on every rank
    # Batches of 3 rows against single ones: sums in another order. Near 4, neighbours in float32 are 5e-7 apart.
    assert results[0][0] == pytest.approx(full_loss(tmp_path / "out"), abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == {n for n, _ in tiny_model(tie_word_embeddings=True).named_parameters()}  # tied: once
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def save_everywhere(folder):
    """All the ways to save, and what they must leave behind."""
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    from hf_sdp import consolidate

    arguments = dict(
        max_steps=6, gradient_accumulation_steps=1, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1, learning_rate=3e-1,
    )  # fmt: skip

    class LateSave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 5 or control.should_save

    trainer = make_trainer(folder, dict(), arguments)
    trainer.add_callback(LateSave())
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    weights = consolidate(trainer.model)
    if trainer.is_world_process_zero():
        assert all(torch.equal(best[n], weights[n]) for n in best)  # load_best took effect
        kept = kept_weights(trainer.model)
        before = dict(kept)
        trainer.save_model(f"{folder}/alone")  # rank 0 only, after training: must not hang
        assert kept.keys() == before.keys()  # the host empties what it is given
    trainer.save_model(f"{folder}/all")
    trainer.model.save_pretrained(f"{folder}/direct")
    trainer.accelerator.save_model(trainer.model, f"{folder}/accelerator")
    trainer.model.save_pretrained(  # the way Accelerate's documentation saves
        f"{folder}/idiom",
        is_main_process=trainer.accelerator.is_main_process,
        save_function=trainer.accelerator.save,
        state_dict=trainer.accelerator.get_state_dict(trainer.model),
    )
    torch.distributed.barrier()
    for name in ("alone", "all", "direct", "accelerator", "idiom"):
        saved = load_file(f"{folder}/{name}/model.safetensors")
        assert saved.keys() == best.keys() and all(torch.equal(saved[n], best[n]) for n in best), name
    return trainer.state.best_metric, full_loss(f"{folder}/all")


def test_saving_by_steps_late_best_and_alone(tmp_path):
    for best_metric, loss in run_workers(save_everywhere, tmp_path):
        assert best_metric == pytest.approx(loss, abs=1e-5)


def save_alone_what_was_not_kept(folder):
    callback = SDPCallback(SDPConfig(evaluation_timeout_s=2), keep_weights_gib=0)
    trainer = make_trainer(folder, None, dict(max_steps=1), callbacks=[callback])
    trainer.train()
    assert kept_weights(trainer.model) is None
    said = ""
    if trainer.is_world_process_zero():
        with pytest.raises(SDPStateError) as raised:
            trainer.save_model(f"{folder}/alone")
        said = str(raised.value)
    torch.distributed.barrier()
    trainer.save_model(f"{folder}/all")
    return said


def test_saving_alone_what_was_not_kept_is_an_error_that_names_the_option(tmp_path):
    said = run_workers(save_alone_what_was_not_kept, tmp_path)[0]
    assert "keep_weights_gib" in said and "ranks [1, 2, 3] have not come to it within 2 s" in said
    assert not (tmp_path / "alone").exists() and (tmp_path / "all" / "model.safetensors").is_file()
