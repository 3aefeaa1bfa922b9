"""The exporter: converts a diffusers checkpoint to a Triton model repository.

torch, diffusers and transformers are imported only when something is converted.
"""
