"""What a worker stores, sends and waits for under DDP and FSDP2, measured exactly as ``hf_sdp`` does it for SDP."""

import statistics

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from hf_sdp.bench.compare.contenders import DDPTraffic
from hf_sdp.engine.metrics import STATE_KINDS, StepMeter
from hf_sdp.engine.traffic import Traffic


class MeterCallback(TrainerCallback):
    """Logs under a DDP or FSDP2 Trainer what SDPCallback logs under SDP: ``add_callback(MeterCallback(trainer))``."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        wrapped = self.trainer.model_wrapped
        traffic = DDPTraffic(wrapped) if isinstance(wrapped, DistributedDataParallel) else Traffic(wrapped)
        self.meter = StepMeter(model, args.device, traffic, profiles_memory=True)

    # The first step is left out: DDP cuts its buckets anew at the start of the second one, and the step whose memory
    # is measured, the meter's second, must come after that.
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.meter.step_begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.meter.gradients_ready()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step > 0:
            had_peak = self.meter.peak_bytes > 0
            self.meter.step_end(optimizer)
            if self.meter.peak_bytes and not had_peak:
                # The peak is above what was there when the step began, and the buckets were.
                self.meter.peak_bytes += getattr(self.meter.traffic, "buffer_bytes", 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            state.log_history[-1].update(self.meter.report(world=True))


def measurements(trainer: Trainer) -> dict[str, float]:
    """One number each from the log of a finished training: bytes of the worker that has most, seconds, loss.

    Raises: ValueError after too few steps: the first two or three are not timed.
    """
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]

    def values(name: str) -> list[float]:
        found = [entry[f"sdp/{name}"] for entry in logged if f"sdp/{name}" in entry]
        if not found:
            raise ValueError(f"{name} was not measured in {trainer.state.global_step} steps: train longer.")
        return found

    return {
        **{f"{kind}_bytes": max(values(f"state_bytes_{kind}_max")) for kind in STATE_KINDS},
        "peak_bytes": max(values("peak_bytes")),
        "bytes_sent_per_step": statistics.median(values("bytes_sent_per_step")),
        "step_time_s": statistics.median(values("step_time_s")),
        "train_loss": logged[-1]["loss"],
    }
