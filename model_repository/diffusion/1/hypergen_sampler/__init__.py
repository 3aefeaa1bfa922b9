"""The sampling loop with step-level continuous batching; `model.py` beside it is its Triton face."""
