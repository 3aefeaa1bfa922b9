"""The real Triton Inference Server out of its PyPI wheel, as a child process of this one.

Knows processes, files and ports; knows nothing of HTTP or pictures. Importing the package itself needs nothing that a
gateway in front of another Triton would not have; its modules need the extra `embedded`.
"""
