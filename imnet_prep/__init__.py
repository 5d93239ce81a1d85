"""ImageNet as people have it, to verified MindRecord shards, to batches."""
