"""The demo: train a small network on real digits, prune it by several criteria, report."""
