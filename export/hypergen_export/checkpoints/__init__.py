"""Reading: checkpoints, their families and weights, LoRA files."""
