"""Inference engines: their options, the shapes they are built for, and TensorRT builds."""
