"""examples/train_image_classifier.py, launched as users do it, on real images that need no network."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.support.examples import EXAMPLES, launch, run

TINY = {
    "resnet18": dict(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]),
    "vit_tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4),
    "swin_tiny": dict(embed_dim=32, depths=[2, 2], num_heads=[2, 4]),
    "convnext_tiny": dict(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, layer_scale_init_value=1.0),
}
"""Model type of the script -> its config's values that make it tiny."""
SDP = {level: ["--engine", "sdp", "--sdp_level", level, "--sdp_coverage", "0.5"] for level in ("block", "neuron")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    run(sys.executable, EXAMPLES / "digits.py", folder, folder=folder, timeout_s=60)
    return folder


def train(digits: Path, folder: Path, model_type: str, *options: str) -> dict:
    """Results of a short training with two workers, which saves the model to ``folder``."""
    command = [EXAMPLES / "train_image_classifier.py", "--image_folder", digits, "--image_size", 16]
    command += ["--model_type", model_type, "--config_overrides", json.dumps(TINY[model_type])]
    command += ["--output_dir", folder, "--cache_dir", folder / "cache", "--max_steps", 40, "--learning_rate", 3e-3]
    command += ["--per_device_eval_batch_size", 60]  # 360 images are whole batches, so that their mean is that of all
    launch(*command, *options, folder=folder)
    return json.loads((folder / "results.json").read_text())


def evaluate_plainly(digits: Path, folder: Path) -> tuple[float, float]:
    """Loss and accuracy of the saved model on the test images, in this process."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    files = sorted(digits.glob("test/*/*.png"))
    labels = torch.tensor([model.config.label2id[file.parent.name] for file in files])
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return loss.item(), (logits.argmax(-1) == labels).float().mean().item()


CASES = [(model_type, options) for options in SDP.values() for model_type in TINY]
# Not of the ResNet: there the others evaluate with the running statistics of each worker.
CASES += [
    (model_type, ["--engine", engine]) for engine in ("ddp", "fsdp2") for model_type in ("vit_tiny", "convnext_tiny")
]
CASES += [("resnet18", [*SDP["neuron"], "--augment", "--channels_last", "--bf16"])]


@pytest.mark.long
@pytest.mark.parametrize(
    "model_type, options",
    CASES,
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_digits_are_learned_and_the_checkpoint_is_as_good_as_the_evaluation_said(digits, tmp_path, model_type, options):
    results = train(digits, tmp_path, model_type, *options)
    loss, accuracy = evaluate_plainly(digits, tmp_path)
    assert accuracy > 0.2  # of ten classes
    tolerance = dict(rel=0.02) if "--bf16" in options else dict(abs=1e-4)
    assert results["eval_loss"] == pytest.approx(loss, **tolerance)
    assert results["eval_accuracy"] == pytest.approx(accuracy, abs=0.02 if "--bf16" in options else 1 / 360)
    assert results["parameters_bytes"] > 0 and results["bytes_sent_per_step"] > 0
    assert results["images_per_step"] == 64
