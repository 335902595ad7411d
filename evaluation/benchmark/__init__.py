"""Benchmarks of `scripts/benchmark.py`: the same work in several ways, compared first, then timed in turns."""
