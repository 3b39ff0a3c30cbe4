"""SDP in a plain Accelerate loop: ``SDPAccelerator`` instead of ``Accelerator``, all else as always.

accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/accelerate_loop.py
"""

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, get_cosine_schedule_with_warmup

from hf_sdp import SDPAccelerator, SDPConfig
from hf_sdp.bench import corpus

STEPS, ACCUMULATED, BATCH_SIZE = 20, 2, 8


def main() -> None:
    accelerator = SDPAccelerator(
        sdp_config=SDPConfig(level="block", masking="forward", coverage=0.5),
        gradient_accumulation_steps=ACCUMULATED,
        cpu=not torch.cuda.is_available(),
    )
    with accelerator.main_process_first():
        data, tokenizer = corpus.prepared("runs/cache", vocab_size=1024, length=64, max_bytes=2_000_000)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    # Accelerate advances the schedule once per worker and step.
    num_advances = STEPS * accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_advances // 10, num_advances)
    batches = DataLoader(data["train"].with_format("torch"), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)

    # Patches the model, shards it, and lets the optimizer point to the shards.
    model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, scheduler)
    model.train()
    step = 0
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)  # of all workers
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if step % 5 == 0:
                mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
                accelerator.print(f"step {step}: loss {mean_loss:.3f}, gradient norm {float(norm):.3f}")
        if step == STEPS:
            break

    accelerator.save_model(model, "runs/accelerate_loop")  # weights of the full model, as a standard checkpoint
    if accelerator.is_main_process:
        config.save_pretrained("runs/accelerate_loop")
        tokenizer.save_pretrained("runs/accelerate_loop")
    accelerator.end_training()


if __name__ == "__main__":
    main()
