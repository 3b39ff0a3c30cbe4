"""``predict_with_generate``: workers that end their sequences at different times."""

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, StoppingCriteria, StoppingCriteriaList

from hf_sdp import SDPCallback, SDPConfig, patch_model
from tests.support.models import tiny_model
from tests.support.trainer import ARGUMENTS, rows_for
from tests.support.workers import run_workers

T5 = dict(task="sequence to sequence", model_type="t5", initializer_factor=3.0)  # says more than one word
LENGTHS = (4, 8)


class OfItsRank(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= LENGTHS[dist.get_rank()])


def trainer_of(folder, model, *callbacks):
    arguments = {**ARGUMENTS, "max_steps": 2, "learning_rate": 1e-4}
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder), predict_with_generate=True, generation_max_length=10, **arguments
    )
    rows = rows_for(model, T5["task"], 8), rows_for(model, T5["task"], 6, first=64)
    return Seq2SeqTrainer(model, args, train_dataset=rows[0], eval_dataset=rows[1], callbacks=list(callbacks))


def generate(trainer):
    criteria = StoppingCriteriaList([OfItsRank()])
    return trainer.predict(trainer.eval_dataset, stopping_criteria=criteria).predictions.tolist()


def train_and_generate(folder, sdp: dict):
    trainer = trainer_of(folder, patch_model(tiny_model(**T5), SDPConfig(**sdp)), SDPCallback())
    trainer.train()
    generated = generate(trainer)
    trainer.save_model(f"{folder}/saved")
    dist.barrier()
    saved = transformers.AutoModelForSeq2SeqLM.from_pretrained(f"{folder}/saved")
    return generated, generate(trainer_of(folder, saved))


@pytest.mark.long
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_what_is_generated_is_the_saved_models(tmp_path, level):
    results = run_workers(train_and_generate, tmp_path, dict(level=level, coverage=0.5), world_size=2)
    for generated, of_saved in results:
        assert generated == of_saved == results[0][0]
        assert len({tuple(row) for row in generated}) > 2
        assert {sum(token != 0 for token in row[1:]) + 1 for row in generated} >= set(LENGTHS)
