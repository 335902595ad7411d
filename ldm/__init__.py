"""Latent diffusion with per-stage prompts: a port of ProSpect on a frozen Stable Diffusion v1."""
