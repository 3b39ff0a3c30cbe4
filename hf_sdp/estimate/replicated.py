"""DDP and ZeRO stages 1 and 2: what they allocate, free and send over a step."""

import math

from ..workload import DTYPES, OPTIMIZER_STATES, Workload
from ..world.ring import BOTH_WAYS, ONE_WAY, sent_in_ring
from .allocations import Action, Allocator
from .shapes import ModelShapes
from .trace import TRACED_LAYERS

DDP_BUCKET_BYTES = 25 * 2**20


class Replicated(Allocator):
    """All parameters everywhere; gradients are reduced in buckets as they come.

    ``zero_stage``: 0 is DDP.
    """

    def __init__(self, shapes: ModelShapes, workload: Workload, world_size: int, zero_stage: int):
        super().__init__()
        self.world_size, self.zero_stage = world_size, zero_stage
        self._untraced_copies = 0
        numel = sum(map(math.prod, shapes.tensors.values()))
        learned = sum(math.prod(shape) for name, shape in shapes.tensors.items() if name not in shapes.frozen)
        stored_bytes, computed_bytes = DTYPES[workload.param_dtype], DTYPES[workload.dtype]
        mixed = stored_bytes != computed_bytes
        num_states = OPTIMIZER_STATES[workload.optimizer]
        if zero_stage == 0:
            self.gradients_stored = learned * stored_bytes
            self.parameters = self.gradients_stored + (numel - learned) * DTYPES[workload.dtype_of_frozen]
            self.optimizer = self.gradients_stored * num_states
            self.gradients = self.gradients_stored  # the buckets
            self._gradient_shards = 1
            if mixed and workload.gradient_checkpointing and not shapes.is_traced_whole:
                self._untraced_copies = _copied_numel_untraced(shapes) * computed_bytes
        else:
            # ZeRO: parameters and gradients in the dtype of computation; the sharded optimizer has the stored ones
            shard = -(-learned // world_size)
            self.parameters = numel * computed_bytes
            self.gradients_stored = (learned if zero_stage == 1 else shard) * computed_bytes
            self.optimizer = shard * stored_bytes * (num_states + mixed)
            self._gradient_shards = 1 if zero_stage == 1 else world_size
        self._bucket = 0
        self._updated_bytes = learned * computed_bytes

    def gradient(self, name: str, nbytes: int) -> None:
        self.gradients += nbytes
        self._bucket += nbytes
        if self._bucket >= DDP_BUCKET_BYTES:
            self._send()

    def _send(self) -> None:
        self.note()
        self.gradients -= self._bucket - self._bucket // self._gradient_shards
        rounds = BOTH_WAYS if self.zero_stage == 0 else ONE_WAY
        self.actions.append(Action("reduce", int(sent_in_ring(self._bucket, self.world_size, rounds))))
        self._bucket = 0

    def mark(self, kind: str, module: str) -> None:
        if kind == "end_of_forward":
            self.activations -= self._untraced_copies
        if kind != "end":
            return
        if self._bucket:
            self._send()
        if self.zero_stage > 0:  # the updated parameters, after the optimizer's step
            self.actions.append(Action("reduce", int(sent_in_ring(self._updated_bytes, self.world_size, ONE_WAY))))


def _copied_numel_untraced(shapes: ModelShapes) -> int:
    """Elements of weights that autocast copies for a forward with activation checkpointing, in layers that are not
    traced: the copies go when forward ends, and the trace has seen those of few layers."""
    layers = shapes.structure.layers
    of_first = (
        math.prod(shape)
        for name, shape in shapes.tensors.items()
        if name.startswith(layers[0] + ".") and len(shape) == 2 and name not in shapes.frozen
    )
    return (len(layers) - TRACED_LAYERS) * sum(of_first)
