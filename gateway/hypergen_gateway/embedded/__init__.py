"""Triton Inference Server from its PyPI wheel, run as a child process.

Importing the package needs no optional dependencies; its modules need the extra `embedded`.
"""
