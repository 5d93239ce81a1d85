"""Records to batches, ready for training or evaluation."""
