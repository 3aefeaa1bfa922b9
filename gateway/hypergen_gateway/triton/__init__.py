"""The backend that is a Triton server, over gRPC."""
