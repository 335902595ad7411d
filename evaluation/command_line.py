"""Flags that the scripts of the lab share."""

from __future__ import annotations

from ldm.cli.flags import Parser, path, positive
from ldm.files.shipped import shipped


def add_model_flags(parser: Parser, steps: int) -> None:
    """Add the flags that name a base model and its classifier (the small model's by default) and how to sample."""
    parser.add_argument("--config", type=shipped, default="configs/demo/finetune.yaml")
    parser.add_argument("--ckpt", type=shipped, default="models/demo/model.safetensors")
    parser.add_argument("--classifier", type=shipped, default="models/demo/classifier.safetensors")
    parser.add_argument("--steps", type=positive, default=steps, help=f"DDIM steps ({steps})")
    parser.add_argument("--scale", type=float, default=2.5, help="guidance scale (2.5)")


def add_job_flags(parser: Parser, outdir: str) -> None:
    """Add the flags that say where and in how many processes to measure, and where results are kept."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=positive, metavar="N", help="processes (one for each core)")
    where.add_argument(
        "--cluster", dest="workers", metavar="ADDRESS", help="measure on a Ray cluster: local, auto or HOST:PORT"
    )
    parser.add_argument("--outdir", type=path, default=path(outdir))
