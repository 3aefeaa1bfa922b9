"""Writing the Triton model repository: components, engines, configuration and the export's record."""
