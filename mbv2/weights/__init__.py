"""Weights: checkpoints, conversion, fine-tuning from them, export."""
