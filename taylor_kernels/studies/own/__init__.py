"""A user's own model and data: scored, pruned, and written to files that are tried before use."""
