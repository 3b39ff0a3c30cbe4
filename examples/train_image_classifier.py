"""Train an image classifier with SDP in an unmodified Trainer, on drawn shapes: nothing is downloaded.

    accelerate launch --config_file configs/accelerate/cpu_2.yaml examples/train_image_classifier.py \\
        --model resnet --sdp_level neuron --sdp_coverage 0.5 --sdp_recalibrate_batches 10

``--sdp_simulate 2 --gradient_accumulation_steps 2`` with plain ``python`` trains the same subnetworks in one process;
``--sdp_coverage 1.0`` is data parallelism. Accuracy is that of the full model.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    HfArgumentParser,
    ResNetConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    set_seed,
)

from hf_sdp import SDPCallback, SDPConfig, patch_model

IMAGE, CLASSES, RADIUS = 32, 4, 6
CONFIGS = {
    "resnet": ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[3, 3, 3], layer_type="basic", num_labels=CLASSES
    ),
    "convnext": ConvNextConfig(
        num_stages=3, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], patch_size=2, image_size=IMAGE,
        layer_scale_init_value=0.1, num_labels=CLASSES,
    ),
    "swin": SwinConfig(
        image_size=IMAGE, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4,
        drop_path_rate=0.0, num_labels=CLASSES,
    ),
    "vit": ViTConfig(
        image_size=IMAGE, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_labels=CLASSES,
    ),
}  # fmt: skip


@dataclass
class Arguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of this example."""

    model: Literal["resnet", "convnext", "swin", "vit"] = field(default="resnet", metadata={"help": "Which model."})
    output_dir: str = "runs/train_image_classifier"
    use_cpu: bool = not torch.cuda.is_available()
    max_steps: int = 100
    per_device_train_batch_size: int = 16
    learning_rate: float = 3e-3
    logging_steps: float = 20
    save_strategy: str = "no"
    report_to: str = "none"


def shapes(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows with an outlined square, a filled one, a cross or a ring, somewhere on a noisy ground."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(IMAGE), torch.arange(IMAGE), indexing="ij")
    rows = []
    for _ in range(number):
        label = torch.randint(CLASSES, (), generator=generator)
        centre = torch.randint(RADIUS, IMAGE - RADIUS, (2,), generator=generator)
        dy, dx = (y - centre[0]).abs(), (x - centre[1]).abs()
        within = torch.maximum(dy, dx) <= RADIUS
        drawn = (
            within & (torch.maximum(dy, dx) >= RADIUS - 1),
            within,
            within & (torch.minimum(dy, dx) <= 1),
            ((dy**2 + dx**2).sqrt() - RADIUS).abs() <= 1,
        )[label]
        colour = 1 + torch.rand(3, 1, 1, generator=generator)
        rows.append(
            {"pixel_values": drawn * colour + torch.randn(3, IMAGE, IMAGE, generator=generator), "labels": label}
        )
    return rows


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    args, sdp = HfArgumentParser((Arguments, SDPConfig.arguments())).parse_args_into_dataclasses()
    set_seed(args.seed)
    model = AutoModelForImageClassification.from_config(CONFIGS[args.model])
    config = SDPConfig.from_arguments(sdp)
    if args.model != "resnet":  # the others have no batch norms
        config = dataclasses.replace(config, recalibrate_batches=None)
    trainer = Trainer(
        model=patch_model(model, config),
        args=args,
        train_dataset=shapes(2000, seed=0),
        eval_dataset=shapes(400, seed=1),
        compute_metrics=accuracy,
        callbacks=[SDPCallback()],
    )
    trainer.train()
    metrics = trainer.evaluate()
    if args.process_index == 0:
        print({name: round(metrics[name], 4) for name in ("eval_loss", "eval_accuracy")})


if __name__ == "__main__":
    main()
