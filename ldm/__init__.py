"""Latent diffusion with per-stage prompts: a port of ProSpect on a frozen Stable Diffusion v1."""

import os

# OpenMP reads this when torch is imported. Threads that spin while they wait crawl as soon as another program wants a
# core, and gain nothing where none does: docs/benchmarks.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
