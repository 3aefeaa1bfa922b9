"""Checkpoints that are one file, as model sites distribute them, converted to diffusers' layout."""
