"""What cutting a pretrained model does to fine-tuning with LoRA: N virtual workers, at equal training FLOPs.

    OMP_NUM_THREADS=1 python examples/benchmarks/lora_quality.py --base-text FILE --text-file FILE --output FOLDER

A small Llama is pretrained on one text. Its weights are frozen, and adapters on all linear layers learn another text.
Data parallel is plain LoRA, as DDP and FSDP2 train it. Each row has the loss before the first step and after the last
one: of the full model with its adapters, which is what is saved, and of what the workers train, mean over them: under
forward masking their subnetworks. Runs that --output has are not repeated. Text by default: for the base the source of
Python's standard library, for the adapters the topics of Python's help. Needs the extra ``bench`` and peft.
"""

import argparse
import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)  # fmt: skip
from transformers.utils import logging

from hf_sdp.bench import corpus
from hf_sdp.bench.quality import Method, Results, TextSetting, parse_methods, train, train_missing
from hf_sdp.bench.quality.results import jobs_in_order
from hf_sdp.bench.quality.setting import text_name
from hf_sdp.bench.quality.training import evaluated
from hf_sdp.model.state import find_state

METHODS = "data-parallel,backward-neuron@0.5,backward-block@0.5,forward-neuron@0.75,forward-block@0.75," \
    "forward-neuron@0.5,forward-block@0.5"  # fmt: skip
TRAINED = "eval_trained_loss"


@dataclass(frozen=True, kw_only=True)
class LoraSetting(TextSetting):
    """``base``: folder of the pretrained model. ``rank``: of the adapters, which are on all linear layers."""

    base: str
    base_text: str
    base_steps: int
    rank: int = 8

    def make_model(self, config: PreTrainedConfig) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.base)
        return get_peft_model(model, LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear"))


class BothEvaluated(Trainer):
    """Evaluates what the workers train beside the full model."""

    def log(self, logs, *args):
        if "eval_loss" in logs:
            logs[TRAINED] = trained_loss(self.model, self.eval_dataset)
        super().log(logs, *args)


@torch.no_grad()
def trained_loss(model: nn.Module, data, rows: int = 16) -> float:
    state = find_state(model)
    was_training = model.training
    model.train()
    losses = []
    differ = state is not None and not state.held.trains_full_forward
    for subnetwork in range(state.held.plan.num_subnetworks if differ else 1):
        if differ:
            state.run.cursor.subnetwork = subnetwork
        for start in range(0, len(data), rows):
            batch = default_data_collator([data[i] for i in range(start, min(start + rows, len(data)))])
            losses.append(model(**batch).loss.item())
    model.train(was_training)
    return statistics.mean(losses)


def pretrained(folder: Path, setting: TextSetting, steps: int, text_file: str | None, cache: str) -> None:
    """Train the base in full, with what one step of all workers reads."""
    data, tokenizer = corpus.prepared(cache, setting.vocab_size, setting.sequence, text_file=text_file)
    set_seed(0)
    args = TrainingArguments(
        output_dir=cache, max_steps=steps, learning_rate=setting.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=steps // 20, weight_decay=0.1, per_device_train_batch_size=setting.workers * setting.batch,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=steps // 4,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    model = TextSetting.make_model(setting, setting.model_config())
    valid = evaluated(data["valid"], setting.eval_sequences)
    trainer = Trainer(model, args, train_dataset=data["train"], eval_dataset=valid, data_collator=default_data_collator)
    trainer.train()
    print(f"the base after {steps} steps, on held-out rows of its own text: {trainer.evaluate()['eval_loss']:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@functools.cache
def rows_of(base: str, sequence: int, text_file: str | None):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    return corpus.blocks(help_topics() if text_file is None else corpus.text_lines(text_file), tokenizer, sequence)


def help_topics():
    from pydoc_data.topics import topics

    from datasets import Dataset

    return Dataset.from_dict({"name": list(topics), "text": list(topics.values())})


def fine_tune(method: Method, seed: int, setting: LoraSetting, text_file: str | None) -> dict:
    data = rows_of(setting.base, setting.sequence, text_file)
    valid = evaluated(data["valid"], setting.eval_sequences)

    def make_trainer(model: nn.Module, args: TrainingArguments) -> Trainer:
        return BothEvaluated(
            model, args, train_dataset=data["train"], eval_dataset=valid, data_collator=default_data_collator
        )

    before = trained_loss(method.build(setting, seed), valid)
    return {"before": before, **train(method, seed, setting, make_trainer, (TRAINED,))}


def table(results: Results) -> str:
    rows = [
        "| method | steps | what is trained, before | and after | the full model, after | by seed |",
        "| --- " * 6 + "|",
    ]
    for name, by_seed in results.runs.items():
        runs = list(by_seed.values())
        full = [run["curve"][-1][1] for run in runs]
        before = statistics.mean(run["before"] for run in runs)
        after = statistics.mean(run[TRAINED][-1][1] for run in runs)
        seeds = ", ".join(f"{loss:.3f}" for loss in full)
        rows.append(
            f"| {name} | {runs[0]['steps']} | {before:.3f} | {after:.3f} | {statistics.mean(full):.3f} | {seeds} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of results.json")
    parser.add_argument("--base-text", help="text file for the base")
    parser.add_argument("--text-file", help="text file for the adapters")
    parser.add_argument("--methods", default=METHODS, help="as of hf-sdp simulate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of plain LoRA")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--cache", default="runs/cache")
    options = parser.parse_args()
    logging.set_verbosity_error()
    shape = dict(
        hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=options.layers,
        vocab_size=1024, steps=options.steps, evaluations=1, eval_sequences=64, learning_rate=options.learning_rate,
    )  # fmt: skip
    key = f"{options.hidden}-{options.layers}-{options.base_steps}-{text_name(options.base_text)}"
    base = Path(options.cache) / f"base-{key}".replace(" ", "_")
    make = functools.partial(
        pretrained, setting=TextSetting(**shape), steps=options.base_steps, text_file=options.base_text,
        cache=options.cache,
    )  # fmt: skip
    base.parent.mkdir(parents=True, exist_ok=True)
    corpus.make_once(base, make)
    setting = LoraSetting(
        **shape, base=str(base), base_text=text_name(options.base_text), base_steps=options.base_steps,
        text="topics of Python's help" if options.text_file is None else text_name(options.text_file),
    )  # fmt: skip
    results = Results(options.output)
    results.expect(setting)
    jobs = jobs_in_order(parse_methods(options.methods.split(","), []), options.seeds)
    train_missing(
        results, jobs, functools.partial(fine_tune, setting=setting, text_file=options.text_file),
        on_done=lambda job, run: print(job[0].name, job[1], run["steps"], run["seconds"], run["before"],
                                       run[TRAINED][-1][1], run["curve"][-1][1], flush=True),
    )  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    main()
