"""Somebody's loop with Accelerate: it knows nothing of hf_sdp."""

import sys

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
ids = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = torch.utils.data.DataLoader(ids, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(2):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
accelerator.save_state(f"{sys.argv[1]}/state")
model.eval()
with torch.no_grad():
    loss = accelerator.gather(model(input_ids=ids[:8], labels=ids[:8]).loss[None]).mean()
accelerator.unwrap_model(model).save_pretrained(
    sys.argv[1], is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
)
accelerator.print("loss", loss.item())
accelerator.end_training()
