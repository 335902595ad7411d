"""What `scripts/benchmark.py` does: the same work in several ways, compared first, then timed in turns."""
