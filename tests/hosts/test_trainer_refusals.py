"""What the Trainer can be asked for, and SDP does not do: an error or a warning by name."""

import logging

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_sdp
from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, SDPStateError, patch_model
from tests.support.models import tiny_config, tiny_model
from tests.support.trainer import ARGUMENTS, Rows, losses_of, make_trainer
from tests.support.workers import run_workers


class Around(nn.Module):
    """A module of the user's, around a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.value = model, model.config, nn.Linear(model.config.hidden_size, 1)

    def forward(self, input_ids, labels=None):
        return value_loss(self.model(input_ids=input_ids, labels=labels, output_hidden_states=True), self.value)


class WithValue(LlamaForCausalLM):
    """The same head as a model of transformers."""

    def __init__(self, config):
        super().__init__(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, labels=None):
        return value_loss(super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True), self.value)


def value_loss(output, value: nn.Module) -> dict[str, torch.Tensor | None]:
    values = value(output.hidden_states[-1]).squeeze(-1)
    loss = None if output.loss is None else output.loss + values.pow(2).mean()
    return {"loss": loss, "logits": output.logits, "values": values}


def trainer_of(folder, model, *callbacks, **arguments):
    args = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, "max_steps": 2, **arguments})
    return Trainer(model, args, train_dataset=Rows(64), eval_dataset=Rows(12, seed=1), callbacks=list(callbacks))


def refuse(folder):
    said = []

    def expect(error, function):
        with pytest.raises(error) as raised:
            function()
        said.append(str(raised.value))

    config = SDPConfig()
    expect(SDPConfigError, lambda: trainer_of(folder, Around(tiny_model()), SDPCallback(config)))
    expect(SDPConfigError, lambda: trainer_of(folder, Around(patch_model(tiny_model(), config)), SDPCallback()))
    expect(SDPStateError, trainer_of(folder, Around(patch_model(tiny_model(), config))).train)
    hf_sdp.disable()
    expect(SDPStateError, trainer_of(folder, patch_model(tiny_model(), config)).train)
    patched = patch_model(tiny_model(), config)
    expect(SDPConfigError, lambda: trainer_of(folder, patched, SDPCallback(), bf16_full_eval=True))
    expect(SDPStateError, trainer_of(folder, patched, SDPCallback(), AsksForStateDict()).train)
    expect(AssertionError, lambda: torch.optim.swa_utils.AveragedModel(patched))
    return said


class AsksForStateDict(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.state_dict()


def test_what_is_refused_names_the_remedy(tmp_path):
    remedies = [
        "class Around(LlamaForCausalLM)", "class Around(LlamaForCausalLM)", "SDPCallback()", "SDPCallback()",
        "Use bf16=True", "hf_sdp.consolidate(model)", "does not support deepcopy",
    ]  # fmt: skip
    for said in run_workers(refuse, tmp_path, world_size=2):
        for message, remedy in zip(said, remedies, strict=True):
            assert remedy in message, message


def train_with_value(folder):
    trainer = trainer_of(folder, patch_model(WithValue(tiny_config()), SDPConfig()), SDPCallback())
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    return trainer.evaluate()["eval_loss"], losses_of(trainer.state.log_history)


@pytest.mark.long
def test_a_head_of_ones_own_is_part_of_the_model(tmp_path):
    results = run_workers(train_with_value, tmp_path, world_size=2)
    rows, saved = Rows(12, seed=1), WithValue.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = saved(rows.ids, rows.labels)["loss"].item()
    assert [loss for loss, _ in results] == [pytest.approx(expected, abs=1e-5)] * 2
    assert expected != pytest.approx(
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")(rows.ids, labels=rows.labels).loss.item()
    )


def give_options_of_ddp(folder):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("hf_sdp").addHandler(handler)
    try:
        make_trainer(
            folder, dict(coverage=1.0), dict(ddp_find_unused_parameters=False, ddp_bucket_cap_mb=1, ddp_timeout=60)
        )
    finally:
        logging.getLogger("hf_sdp").removeHandler(handler)
    return records


def test_options_of_ddp_are_without_effect_and_that_is_said(tmp_path):
    on_rank_0, on_rank_1 = run_workers(give_options_of_ddp, tmp_path, world_size=2)
    assert on_rank_0 == [
        "ddp_find_unused_parameters, ddp_bucket_cap_mb: without effect, since a patched model is not in DDP."
    ]
    assert on_rank_1 == []
