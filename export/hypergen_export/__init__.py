"""The exporter: a diffusers checkpoint becomes a Triton model repository.

Importing the package costs nothing: torch, diffusers and transformers are imported when an export really runs.
"""
