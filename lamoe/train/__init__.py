"""Training: reading text (sources), packing and sampling it (data), the schedule (optim), the loop, checkpoints."""
