"""Training: the run and its loop, its state, the step, optimizer, schedule, ranks and logs."""
