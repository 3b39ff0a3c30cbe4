"""The unmodified Trainer on tiny models and random rows."""

import torch

from hf_sdp import SDPCallback, SDPConfig, patch_model
from tests.support.models import VOCAB, batch_for, tiny_model

ARGUMENTS = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=4, gradient_accumulation_steps=2,
    max_grad_norm=0.5, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    use_cpu=True, seed=0, lr_scheduler_type="constant",
)  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens; rows of different length (padded, ignored) when ``ragged``."""

    def __init__(self, num_rows: int, seed: int = 0, ragged: bool = False):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, VOCAB, (num_rows, 16), generator=g)
        self.labels = self.ids.clone()
        if ragged:
            for row, length in enumerate(torch.randint(4, 17, (num_rows,), generator=g).tolist()):
                self.labels[row, length:] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def make_trainer(
    folder, sdp: dict | None, arguments: dict | None = None, model: dict | None = None, ragged=False, **kwargs
):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **(arguments or {})})
    net = tiny_model(seed=0 if sdp is None else args.process_index, **(model or {}))
    if sdp is not None:
        net = patch_model(net, SDPConfig(**sdp))
        kwargs["callbacks"] = [*kwargs.get("callbacks", []), SDPCallback()]
    task = (model or {}).get("task")
    train_rows = Rows(64, ragged=ragged) if task is None else rows_for(net, task, 64)
    eval_rows = Rows(24, seed=1) if task is None else rows_for(net, task, 6, first=64)
    return Trainer(model=net, args=args, train_dataset=train_rows, eval_dataset=eval_rows, **kwargs)


def rows_for(net, task: str, num_rows: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    batches = (batch_for(net, first + row, task) for row in range(num_rows))
    return [{name: values[0] for name, values in batch.items()} for batch in batches]


def train(folder, sdp, arguments=None, model=None, ragged=False):
    trainer = make_trainer(folder, sdp, arguments, model, ragged)
    result = trainer.train()
    return result.training_loss, trainer.evaluate()["eval_loss"], trainer.state.log_history


def losses_of(log_history) -> list[float]:
    return _logged("loss", log_history)


def norms_of(log_history) -> list[float]:
    return _logged("grad_norm", log_history)


def _logged(key: str, log_history) -> list[float]:
    values = [entry[key] for entry in log_history if key in entry]
    assert values, f"no {key} was logged: nothing would be compared"
    return values
