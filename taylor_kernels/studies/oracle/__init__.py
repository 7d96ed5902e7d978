"""`taylor-kernels compare`: each criterion against the oracle, on digits or on a user's model."""
