"""The same in a loop with Accelerate: a state saved in the middle, from which it goes on (as run_clm_no_trainer.py)."""

import argparse
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny import evaluate_and_save, llama, loader_of, loss_of, token_rows
from transformers import AutoModelForCausalLM, get_scheduler, set_seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--max_train_steps", type=int, default=8)
    parser.add_argument("--checkpointing_steps", type=int, default=4)
    parser.add_argument("--resume_from_checkpoint", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    model = llama()
    loader = loader_of(token_rows(64), shuffle=True, batch_size=2)
    eval_loader = loader_of(token_rows(8, seed=1), batch_size=2)
    decayed = {n: p for n, p in model.named_parameters() if not n.endswith(("bias", "layernorm.weight"))}
    others = [p for n, p in model.named_parameters() if n not in decayed]
    groups = [{"params": [*decayed.values()], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = get_scheduler("linear", optimizer, 0, args.max_train_steps * accelerator.num_processes)
    model, optimizer, loader, eval_loader, schedule = accelerator.prepare(
        model, optimizer, loader, eval_loader, schedule
    )
    done = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.resume_from_checkpoint))
        done = int(args.resume_from_checkpoint.name.removeprefix("step_"))
    losses, per_epoch = [], math.ceil(len(loader) / 2)
    for epoch in range(done // per_epoch, 10):
        model.train()
        active = loader
        if args.resume_from_checkpoint and epoch == done // per_epoch:
            active = accelerator.skip_first_batches(loader, done % per_epoch * 2)
        for batch in active:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.detach().float().item())
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if done % args.checkpointing_steps == 0 and done < args.max_train_steps:
                    accelerator.save_state(str(args.output_dir / f"step_{done}"))
            if done >= args.max_train_steps:
                break
        if done >= args.max_train_steps:
            break
    evaluate_and_save(accelerator, model, eval_loader, losses, args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForCausalLM.from_pretrained(sys.argv[2]), token_rows(8, seed=1)))
    else:
        main()
