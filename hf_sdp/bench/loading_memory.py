"""Memory of the host that loading a checkpoint takes, by worker."""

import threading
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ..config import SDPConfig
from ..engine.sharded import get_sharded
from ..hosts.accelerator import SDPAccelerator
from ..model.state import local_tensor
from ..patch import patch_model
from ..pretrained import from_pretrained
from .small_llama import small_llama


class PeakMemory(threading.Thread):
    """Largest resident memory of this process while it runs: all of it, and what is not mapped from files, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.all, self.anonymous = threading.Event(), 0, 0

    def run(self):
        while not self.done.is_set():
            self.all, self.anonymous = (max(a, b) for a, b in zip((self.all, self.anonymous), resident(), strict=True))
            self.done.wait(0.002)

    def stop(self) -> tuple[int, int]:
        self.done.set()
        self.join()
        return self.all, self.anonymous


def resident() -> tuple[int, int]:
    """Resident memory of this process, and what of it is not mapped from files, in bytes. Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    everything, anonymous = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return everything, anonymous


def load_and_watch(folder: str, sdp: dict, sliced: bool) -> dict[str, int]:
    """Collective: load a checkpoint slice by slice (``sliced``), or in full and patch it.

    Returns: bytes: the peak of ``resident`` and of ``anonymous`` memory above what there was before, and what is
    ``stored`` of the parameters on this worker.
    """
    accelerator = SDPAccelerator(cpu=True)
    before, watch = resident(), PeakMemory()
    watch.start()
    if sliced:
        model = from_pretrained(folder, SDPConfig(**sdp))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = accelerator.prepare(patch_model(model, SDPConfig(**sdp)))
    peak = watch.stop()
    sharded = get_sharded(model, "Measuring what is stored")
    stored = sum(local_tensor(p.detach()).nbytes for p in sharded.parameters.values())
    return {"resident": peak[0] - before[0], "anonymous": peak[1] - before[1], "stored": stored}


def make_checkpoint(folder: Path) -> int:
    """Makes a checkpoint of 325 MB; returns the bytes of its largest tensor."""
    config = small_llama(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        use_cache=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return max(p.nbytes for p in model.parameters())
