"""What proves, on a copy of a model, that masking units equals removing them."""
