"""Checkpoint components become ONNX graphs, each held against torch."""
