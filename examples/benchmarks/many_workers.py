"""32 real workers train, evaluate, save and resume: 8 subnetworks with 4 replicas each.

    OMP_NUM_THREADS=1 python examples/benchmarks/many_workers.py

Forked processes over gloo, a tiny Llama, the Trainer. A run of 4 steps that saves after the second; then one that
resumes there in new processes. The resumed run must end with the weights of the other bit for bit, and every worker
must report the same evaluation loss.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from hf_sdp.bench.workers import launch

CONFIG = dict(level="neuron", coverage=0.5, num_subnetworks=8)


def train(folder: str, resume: str | None, sdp: dict) -> tuple[float, int]:
    """One worker. Returns: loss of the evaluation at the end, and the number of its process groups."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    from hf_sdp import SDPCallback, SDPConfig, verify
    from hf_sdp.bench.small_llama import small_llama

    arguments = TrainingArguments(
        output_dir=folder, max_steps=4, save_steps=2, use_cpu=True, seed=0, per_device_train_batch_size=1,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    set_seed(0)
    model = LlamaForCausalLM(small_llama(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8))
    ids = torch.randint(0, 64, (256, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    callback = SDPCallback(SDPConfig(**sdp))
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:64], callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    verify(trainer.model)
    trainer.save_model(f"{folder}/end")
    return loss, dist.get_pg_count()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers, ends = [], []
        for run, resume in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-2")):
            answers.append(launch(train, options.workers, f"{folder}/{run}", resume, CONFIG, timeout_s=600))
            ends.append(hashlib.sha256(Path(folder, run, "end", "model.safetensors").read_bytes()).hexdigest())
    losses = {loss for run in answers for loss, _ in run}
    groups = sorted({count for run in answers for _, count in run})
    result = {"workers": options.workers, "losses": sorted(losses), "groups": groups, "equal": ends[0] == ends[1]}
    print(json.dumps(result))
    sys.exit(not (result["equal"] and len(losses) == 1))


if __name__ == "__main__":
    main()
