"""MobileNetV2 on MindSpore: train, evaluate, predict, export."""
