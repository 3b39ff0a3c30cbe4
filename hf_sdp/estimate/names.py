"""What engines are called in tables and on pages, predicted or measured."""

DDP, DDP_CHECKPOINTING = "DDP", "DDP, checkpointing"
ZERO_1, ZERO_2 = "ZeRO-1", "ZeRO-2"
FSDP2, FSDP2_NO_RESHARD = "FSDP2", "FSDP2, no reshard"
"""ZeRO-3. FSDP2 reshards after forward where nothing is said, as Accelerate's default does; SDP does not."""
SDP = "SDP"
RESHARD, SHARDING_NONE = "reshard", "sharding none"
"""What follows the name of SDP where it is not sharded by default."""
