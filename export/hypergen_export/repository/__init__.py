"""Components, engines and configuration become a Triton model repository."""
