"""What holds masked channels, experts and blocks at zero while a model is trained."""
