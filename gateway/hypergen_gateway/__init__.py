"""The HTTP side of HyperGen: OpenAI's API in front of Triton. Never imports torch or the exporter."""
