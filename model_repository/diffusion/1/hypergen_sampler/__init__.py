"""The sampling loop with step-level continuous batching; `model.py` beside it is the Triton model."""
