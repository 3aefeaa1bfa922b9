"""The real Triton Inference Server out of its PyPI wheel, as a child process of this one.

Knows processes, files and ports; knows nothing of HTTP or pictures.
"""

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.supervisor import EmbeddedTriton, embedded_triton

__all__ = ["EmbeddedError", "EmbeddedTriton", "embedded_triton"]
