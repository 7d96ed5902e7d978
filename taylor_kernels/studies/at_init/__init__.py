"""`taylor-kernels at-init`: accuracy against sparsity of networks that are pruned before they learn
anything, on digits or on a user's model."""
