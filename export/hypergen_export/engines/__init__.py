"""ONNX graphs become what a runtime executes, and the shapes they are built for."""
