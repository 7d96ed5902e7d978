"""What a trace reads of a model without running it: its code, settings and what modules keep."""
