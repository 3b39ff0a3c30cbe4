"""SDP in an unmodified Trainer.

accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/trainer_minimal.py
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from hf_sdp import SDPCallback, SDPConfig, patch_model
from hf_sdp.bench import corpus

args = TrainingArguments(
    output_dir="runs/trainer_minimal",
    use_cpu=not torch.cuda.is_available(),
    max_steps=20,
    learning_rate=2e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
)
with args.main_process_first():
    data, tokenizer = corpus.prepared("runs/cache", vocab_size=1024, length=64, max_bytes=2_000_000)
config = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)

model = patch_model(
    AutoModelForCausalLM.from_config(config), SDPConfig(level="neuron", masking="forward", coverage=0.5)
)
trainer = Trainer(model, args, train_dataset=data["train"], eval_dataset=data["valid"], callbacks=[SDPCallback()])
trainer.train()
trainer.evaluate()  # the full model
trainer.save_model()  # a standard checkpoint of the full model
