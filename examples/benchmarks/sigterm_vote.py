"""What it costs a tiny model to ask after every step whether any worker has got SIGTERM.

    OMP_NUM_THREADS=1 python examples/benchmarks/sigterm_vote.py

Medians over 200 steps, in milliseconds: a step, and the vote after it. The vote also waits for the slowest worker,
which the first collective of the next step would do otherwise.
"""

import statistics
import time

import torch

from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

NUM_WORKERS, NUM_STEPS = 2, 200


def measure() -> tuple[float, float]:
    from transformers import LlamaForCausalLM

    from hf_sdp import SDPAccelerator, SDPConfig, patch_model
    from hf_sdp.engine.sharded import control_group
    from hf_sdp.world.agreement import any_worker

    accelerator = SDPAccelerator(cpu=True)
    config = small_llama(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = patch_model(LlamaForCausalLM(config), SDPConfig(coverage=0.5))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    ids, steps, votes = torch.randint(0, 128, (2, 16)), [], []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        any_worker(False, control_group(model))
        votes.append(time.perf_counter() - stepped)
        steps.append(stepped - began)
    return 1e3 * statistics.median(steps), 1e3 * statistics.median(votes)


if __name__ == "__main__":
    for rank, (step_ms, vote_ms) in enumerate(launch(measure, NUM_WORKERS)):
        print(f"rank {rank}: step {step_ms:.2f} ms, vote {vote_ms:.3f} ms: {100 * vote_ms / step_ms:.1f} %")
