"""Train a model that classifies images with SDP, DDP or FSDP2 under the Trainer, and write what it took to a file.

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/train_image_classifier.py \\
        --dataset_name cifar10 --augment --model_type vit_tiny --engine sdp --sdp_level block --num_train_epochs 10

Without a network: ``python examples/digits.py runs/digits``, then ``--image_folder runs/digits`` instead of the
dataset. Options: the model, the data, every field of ``SDPConfig`` as ``--sdp_...``, and ``TrainingArguments``.
Needs the extra ``bench`` and ``pip install evaluate``; torchvision only where the processor of a published model does.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
import torch
from engines import EngineArguments, initial_model, load_model, train_and_measure
from PIL import Image, ImageOps
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    ViTImageProcessorPil,
    default_data_collator,
)
from transformers.utils.logging import disable_progress_bar

from hf_sdp import SDPCallback, SDPConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "resnet18": dict(
        model_type="resnet",
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
    ),
    "swin_tiny": dict(  # without a fourth stage: its 2x2 patches are no window
        model_type="swin",
        patch_size=2,
        window_size=4,
        depths=[2, 6, 2],
        num_heads=[3, 6, 12],
        drop_path_rate=0.0,
    ),
    "vit_tiny": dict(
        model_type="vit",
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
    ),
    "convnext_tiny": dict(model_type="convnext", patch_size=2),
}
"""Name -> its config, for images of 32x32."""
FSDP_MODULES = {
    "resnet": ["resnet.encoder.stages.*.layers.*"],
    "swin": ["swin.encoder.layers.*.blocks.*"],
    "vit": ["vit.layers.*"],
    "convnext": ["convnext.encoder.stages.*.layers.*"],
}
"""Model type -> what FSDP2 gathers together."""


@dataclass
class ModelArguments:
    """A published model, or one with random weights."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint, of the hub or a folder; its head may be of other classes."}
    )
    model_type: Literal["resnet18", "swin_tiny", "vit_tiny", "convnext_tiny"] = field(
        default="resnet18", metadata={"help": "Without a checkpoint: random weights, in a size for small images."}
    )
    config_overrides: str = field(
        default="{}", metadata={"help": """Other values of the model's config, as '{"depths": [1, 1, 1, 1]}'."""}
    )


@dataclass
class DataArguments:
    """The images, and how they are prepared."""

    dataset_name: str = field(default="cifar10", metadata={"help": "Of the hub: cifar10, cifar100, imagenet-1k, ..."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Instead: a folder with train/CLASS/*.png, and test or validation likewise."}
    )
    image_size: int = field(
        default=32, metadata={"help": "Pixels of a side. The processor of a checkpoint has its own."}
    )
    augment: bool = field(default=False, metadata={"help": "Train with random crops and horizontal flips."})
    channels_last: bool = field(default=False, metadata={"help": "Batches in channels-last memory format."})
    metric: str = field(
        default=str(Path(__file__).with_name("accuracy")),
        metadata={"help": "Of evaluate.load: the default needs no network, `accuracy` is the hub's."},
    )
    cache_dir: str = field(default="runs/cache", metadata={"help": "Initial weights are kept here."})


@dataclass
class Arguments(EngineArguments):
    """Defaults of this example."""

    output_dir: str = "runs/train_image_classifier"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-3
    remove_unused_columns: bool | None = False  # images become pixel values when a batch is read


@dataclass
class Prepare:
    """Rows of images and labels as what a model takes: pixel values, float32 of shape (rows, 3, height, width)."""

    processor: BaseImageProcessor
    image: str
    label: str
    augment: bool

    def __call__(self, rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[self.image]]
        if self.augment:
            images = [augmented(image) for image in images]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": rows[self.label]}


def augmented(image: Image.Image) -> Image.Image:
    """A random crop of the image's size out of it and a black border of an eighth, flipped as often as not.

    Draws from torch's generator, whose state is in the Trainer's checkpoints.
    """
    border = max(image.size) // 8
    left, top, flip = (int(torch.randint(end, ())) for end in (2 * border + 1, 2 * border + 1, 2))
    padded = ImageOps.expand(image, border)
    crop = padded.crop((left, top, left + image.width, top + image.height))
    return ImageOps.mirror(crop) if flip else crop


def load_images(arguments: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset, str, str]:
    """Rows to train and to evaluate, and their columns of images and of labels: the first of each kind."""
    if arguments.image_folder is None:
        data = datasets.load_dataset(arguments.dataset_name)
    else:
        data = datasets.load_dataset("imagefolder", data_dir=arguments.image_folder)
    columns = data["train"].features.items()
    image = next(name for name, feature in columns if isinstance(feature, datasets.Image))
    label = next(name for name, feature in columns if isinstance(feature, datasets.ClassLabel))
    # The labels of ImageNet's test are not published.
    return data["train"], data["validation" if "validation" in data else "test"], image, label


def make_config(arguments: ModelArguments, image_size: int, classes: list[str]) -> PreTrainedConfig:
    values = dict(id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)})
    values |= json.loads(arguments.config_overrides)
    if arguments.model_name_or_path is not None:
        return AutoConfig.from_pretrained(arguments.model_name_or_path, **values)
    values = CONFIGS[arguments.model_type] | values
    if values["model_type"] != "resnet":  # it takes images of any size
        values["image_size"] = image_size
    return AutoConfig.for_model(**values)


def collate(rows: list[dict[str, Any]], memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
    batch = default_data_collator(rows)
    return {**batch, "pixel_values": batch["pixel_values"].contiguous(memory_format=memory_format)}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, SDPConfig.arguments(), Arguments))
    model_args, data_args, sdp_args, training = parser.parse_args_into_dataclasses()
    sdp = SDPConfig.from_arguments(sdp_args)
    disable_progress_bar()  # of loading weights, on every worker; the Trainer's stays
    with training.main_process_first():
        train, test, image, label = load_images(data_args)
        metric = evaluate.load(data_args.metric, keep_in_memory=True)
        config = make_config(model_args, data_args.image_size, train.features[label].names)
        if model_args.model_name_or_path is None:
            source = initial_model(AutoModelForImageClassification, config, training.seed, data_args.cache_dir)
            side = data_args.image_size
            processor = ViTImageProcessorPil(size={"height": side, "width": side})
        else:
            source = model_args.model_name_or_path
            processor = AutoImageProcessor.from_pretrained(source)
    model = load_model(
        AutoModelForImageClassification,
        source,
        training,
        sdp,
        FSDP_MODULES.get(config.model_type, ()),
        config=config,
        ignore_mismatched_sizes=True,  # of a head for other classes
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    memory_format = torch.channels_last if data_args.channels_last else torch.contiguous_format
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train.with_transform(Prepare(processor, image, label, data_args.augment)),
        eval_dataset=test.with_transform(Prepare(processor, image, label, augment=False)),
        processing_class=processor,
        data_collator=functools.partial(collate, memory_format=memory_format),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[SDPCallback(profile_memory=True)] if training.engine == "sdp" else None,
    )
    # The loss is the mean of a batch. Not all models for images can take the number of images of the world instead.
    trainer.model_accepts_loss_kwargs = False
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    train_and_measure(trainer, sdp, images_per_step=batch)


if __name__ == "__main__":
    main()
