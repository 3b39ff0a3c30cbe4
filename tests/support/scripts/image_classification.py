"""An image folder is classified under the Trainer (as run_image_classification.py)."""

import sys
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)  # fmt: skip

METRIC = Path(__file__).parents[3] / "examples" / "accuracy"


@dataclass
class DataArguments:
    train_dir: Path
    validation_dir: Path
    cache_dir: str
    max_train_samples: int = 256
    max_eval_samples: int = 32


def images(data_args: DataArguments, processor) -> dict[str, Dataset]:
    """Rows of both folders, chosen at random."""
    files = {"train": f"{data_args.train_dir}/**", "validation": f"{data_args.validation_dir}/**"}
    dataset = load_dataset("imagefolder", data_files=files, cache_dir=data_args.cache_dir)

    def transforms(batch):
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch["label"]}

    chosen = {}
    for split, number in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        chosen[split] = dataset[split].shuffle(seed=0).select(range(number))
        chosen[split].set_transform(transforms)
    return chosen


def collate_fn(examples):
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}


def main() -> None:
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    rows = images(data_args, processor)
    labels = rows["train"].features["label"].names
    metric = evaluate.load(str(METRIC))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(image_size=8, patch_size=2, initializer_range=0.2)
    names = dict(id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    model = AutoModelForImageClassification.from_config(ViTConfig(**sizes, **names))

    def compute_metrics(prediction):
        found = np.argmax(prediction.predictions, axis=1)
        return metric.compute(predictions=found, references=prediction.label_ids)

    trainer = Trainer(
        model=model, args=args, train_dataset=rows["train"], eval_dataset=rows["validation"],
        compute_metrics=compute_metrics, processing_class=processor, data_collator=collate_fn,
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="image-classification", tags=["vision"])


def loss_of_saved(folder: str, arguments: list[str]) -> float:
    data_args, *_ = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        arguments, return_remaining_strings=True
    )
    rows = images(data_args, AutoImageProcessor.from_pretrained(folder))["validation"]
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder).eval()(**collate_fn(list(rows))).loss.item()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of_saved(sys.argv[2], sys.argv[3:]))
    else:
        main()
