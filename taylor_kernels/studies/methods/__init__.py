"""Each compression method on small problems, beside its baselines: a file per method.

`problems` has the networks and data, `study` the frame: ways of making a network smaller, run for
each problem and seed and kept as they finish. `pages` makes tables and plots of the results.
`python -m bench.methods` runs a study and keeps what it finds.
"""
