"""Conversion of components to ONNX, each compared with torch."""
