"""Benchmarks: each module prints one JSON line per measurement; run one as `python -m
benchmarks.NAME`.
"""
