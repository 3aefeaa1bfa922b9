"""HyperGen's gateway: OpenAI's Images API in front of Triton. Does not depend on torch or the exporter."""
