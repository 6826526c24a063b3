"""Experiments: run one as `python -m experiments.NAME --help`."""
