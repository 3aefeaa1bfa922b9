"""The Triton backend: a client of a Triton server, over gRPC."""
