"""What the examples share that train one model with SDP, DDP or FSDP2 and write what it took to a file."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from measure import MeterCallback, measurements
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from hf_sdp import SDPConfig, patch_model
from hf_sdp.bench.corpus import make_once


@dataclass
class ExampleArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of the examples."""

    use_cpu: bool = not torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False  # there are none: DDP at its fastest
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    log_level: str = "warning"
    save_strategy: str = "no"
    report_to: str = "none"


@dataclass
class EngineArguments(ExampleArguments):
    """And which engine trains."""

    engine: Literal["sdp", "ddp", "fsdp2"] = field(default="sdp", metadata={"help": "How workers share the model."})
    results_file: str | None = field(
        default=None, metadata={"help": "Measurements, as JSON. By default results.json in the output_dir."}
    )


def initial_model(auto_class: Any, config: PreTrainedConfig, seed: int, cache_dir: str) -> Path:
    """Folder with randomly initialized weights, made once: every engine and every worker starts from them."""
    key = hashlib.sha256(f"{config.to_json_string()}{seed}".encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"{config.model_type}-{key}"

    def make(unfinished: Path) -> None:
        set_seed(seed)
        auto_class.from_config(config).save_pretrained(unfinished)

    make_once(folder, make)
    return folder


def load_model(
    auto_class: Any,
    source: str | Path,
    training: EngineArguments,
    sdp: SDPConfig,
    fsdp_modules: Iterable[str],
    **options: Any,
) -> PreTrainedModel:
    """The model as the engine wants it: sharded for FSDP2, patched for SDP, whole for DDP (the Trainer wraps it).

    FSDP2 is the one of transformers, because it also works on CPU; there Accelerate ignores ``TrainingArguments(fsdp=
    ...)`` and trains with DDP. It reshards after forward as SDP does, so that the two differ in nothing else.

    Args:
        source: of ``from_pretrained``, as are the ``options``.
        fsdp_modules: what FSDP2 gathers together; ``*`` is a number. Without any: what transformers says for the model.
    """
    set_seed(training.seed)  # a head that the checkpoint does not have
    if training.engine == "fsdp2":
        style = "free_full_weight" if sdp.reshard_after_forward else "keep_full_weight"
        plan = dict.fromkeys(fsdp_modules, style) or None
        sharding = DistributedConfig(fsdp_size=training.world_size, fsdp_plan=plan)
        return auto_class.from_pretrained(source, distributed_config=sharding, **options)
    model = auto_class.from_pretrained(source, **options)
    return patch_model(model, sdp) if training.engine == "sdp" else model


def train_and_measure(trainer: Trainer, sdp: SDPConfig, **facts: Any) -> None:
    """Train, evaluate and save the full model, and write what it took, with the ``facts``, to the results file."""
    training = trainer.args
    if training.engine != "sdp":
        trainer.add_callback(MeterCallback(trainer))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    evaluation = trainer.evaluate()  # of the full model
    trainer.save_model()  # a standard checkpoint of the full model, whatever the engine
    if not trainer.is_world_process_zero():
        return
    results = {
        "engine": training.engine,
        "sdp": asdict(sdp) if training.engine == "sdp" else None,
        "workers": training.world_size,
        "steps": trainer.state.global_step,
        **facts,
        **measurements(trainer),
        **{name: value for name, value in evaluation.items() if name.endswith(("loss", "accuracy"))},
    }
    file = Path(training.results_file or f"{training.output_dir}/results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
