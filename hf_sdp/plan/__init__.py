"""Who holds what, and what is sharded together. Pure data: no processes, no torch.distributed."""
