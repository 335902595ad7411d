"""The optimisations by name. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WHATS = ("train", "sample", "text", "vae", "load", "scaling")


class Work(NamedTuple):
    """What is done: `what` of the first four of `WHATS`, on a batch of images (3, R, R), in so many sampling steps."""

    what: str
    batch: int
    resolution: int
    steps: int = 1


# name -> (on by default, where it matters, what it does)
SWITCHES: dict[str, tuple[bool, tuple[str, ...], str]] = {
    "latents": (True, ("train",), "posterior moments are computed once, not in every step"),
    "stages": (True, ("train",), "only the stages that occur in the batch are encoded, not all S"),
    "frozen": (True, ("train",), "no gradients of frozen weights"),
    "fused_adamw": (True, ("train",), "PyTorch's fused optimizer kernel"),
    "batch": (True, ("train", "sample"), "the samples of a batch at once, not one after the other"),
    "attention": (True, ("train", "sample", "vae"), "the kernel that was measured to be faster, not plain products"),
    "text_batch": (True, ("sample", "text"), "one text pass for all distinct prompts, not one for each stage"),
    "layers": (True, ("train", "text"), "NeTI: the prompts of all U-Net layers in one text pass, not one for each"),
    "shared_rows": (True, ("train", "text"), "NeTI: tokens before the learned one encoded once for all layers"),
    "token_table": (True, ("train",), "NeTI: no gradient of the token table, which its code computes and never uses"),
    "guidance_batch": (True, ("sample",), "both predictions of guidance in one batch"),
    "kv": (True, ("sample",), "keys and values of the context kept while the stage does not change"),
    "fast": (False, ("sample",), "DPM-Solver++ in two fifths of the steps: other images"),
    "half_guided": (False, ("sample",), "no guidance in the last half of the stages: other images"),
    "fused_attention": (False, ("train", "sample", "vae"), "PyTorch's fused attention everywhere"),
    "channels_last": (False, ("train", "sample", "vae"), "memory format of the convolutions"),
    "bfloat16": (False, ("train", "sample", "text", "vae"), "frozen weights in bfloat16"),
    "float16": (False, ("train", "sample", "text", "vae"), "frozen weights in float16"),
    "compile": (False, ("train", "sample"), "torch.compile of the U-Net (reduce-overhead)"),
    "max_autotune": (False, ("train", "sample"), "torch.compile of the U-Net in its mode max-autotune"),
    "cuda_graph": (False, ("train", "sample"), "U-Net call, or the whole step, captured in a CUDA graph"),
    "decode_slices": (False, ("sample", "vae"), "the first stage decodes one image at a time"),
}
DEFAULTS = frozenset(name for name, (on, _, _) in SWITCHES.items() if on)
# ProSpect's code too keeps no gradients of frozen weights, and makes both predictions of guidance in one batch.
REFERENCE = frozenset({"frozen", "guidance_batch", "token_table"})
NETI_REFERENCE = REFERENCE - {"token_table"} | {"batch"}
OTHER_IMAGES = frozenset({"fast", "half_guided"})  # whose results are not compared
OPAQUE = frozenset({"compile", "max_autotune", "cuda_graph"})  # hide their operations from torch's counter
PEERS = ("diffusers", "diffusers-compiled")


def with_stages(overrides: Sequence[str], count: int) -> list[str]:
    """Return overrides of a configuration for that number of stages."""
    return [*overrides, f"model.params.prospect_stages={count}"]


def describe() -> str:
    """Return the switches as lines for `--help`."""
    lines = ["switches (--on, --off; those marked * are on):"]
    for name, (on, whats, text) in SWITCHES.items():
        lines.append(f"  {'*' if on else ' '} {name:15} {text} ({', '.join(whats)})")
    return "\n".join(lines)


def dtype_name(switches: frozenset[str]) -> str:
    """Return the precision of the frozen weights, as LatentDiffusion's `frozen_dtype`."""
    return next((name for name in ("bfloat16", "float16") if name in switches), "float32")
