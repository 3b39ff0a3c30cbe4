"""A notebook, or what is exported of one: it starts its processes itself."""

import torch
from accelerate import Accelerator, debug_launcher
from tiny import llama, loader_of, token_rows
from transformers import set_seed


def train() -> None:
    accelerator = Accelerator()
    set_seed(0)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(token_rows(16), batch_size=2))
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    numbers = accelerator.gather(torch.tensor([sum(p.numel() for p in model.parameters())])).tolist()
    accelerator.print("parameters of the workers", numbers)
    accelerator.end_training()


if __name__ == "__main__":
    debug_launcher(train, num_processes=2)
