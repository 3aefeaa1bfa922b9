"""What is read: checkpoints, their families and weights, LoRA files."""
