"""What a plan costs, before it is launched: memory, step time, traffic."""
