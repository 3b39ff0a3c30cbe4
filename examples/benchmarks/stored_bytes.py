"""``stored_bytes.py FILE ...``: as ``python -m hf_sdp.run ...``, and FILE.RANK says what a worker stores.

Parameters, gradients and moments, at the script's first optimizer step: nothing needs to be known of its loop.
"""

import json
import os
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_sdp import run
from hf_sdp.engine.metrics import state_bytes
from hf_sdp.engine.optimizer import model_of
from hf_sdp.model.state import unwrap

file = Path(f"{sys.argv.pop(1)}.{os.environ['RANK']}")


def after_step(optimizer, args, kwargs) -> None:
    if file.exists() or model_of(optimizer) is None:
        return
    model = unwrap(model_of(optimizer))
    # Of DDP, in float32, without its buckets: a gradient and two moments of what learns.
    dense = model.get_memory_footprint(return_buffers=False) + 3 * 4 * model.num_parameters(only_trainable=True)
    file.write_text(json.dumps({"stored": sum(state_bytes(model, optimizer).values()), "dense": dense}))


register_optimizer_step_post_hook(after_step)
run.main()
