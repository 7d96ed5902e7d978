"""What removal cuts out of a model's tensors and out of its optimizers' state."""
