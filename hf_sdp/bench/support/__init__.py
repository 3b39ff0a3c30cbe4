"""Which model types work: each is tried at a tiny size."""
