"""Under the names of the host libraries: Accelerate's Accelerator and transformers' Trainer."""
