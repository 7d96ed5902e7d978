"""Benches: `python -m bench` runs them all and writes the report; bench/README.md says how."""
