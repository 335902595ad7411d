"""Does a model draw what its captions say? Counted with the attribute classifier on the rendered world.

Shapes: N captions, F factors.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from evaluation.images import Sampling, decode, encode, load, sample, to_bytes
from evaluation.jobs import Result
from evaluation.judges import load_judge
from evaluation.world.attributes import caption, random_attributes
from evaluation.world.rendered import render


def follow_captions(
    config: str, ckpt: str, classifier: str, seed: int, count: int, held_out: bool, sampling: Sampling
) -> Result:
    """Return images of N = `count` random captions, and whether each attribute is the caption's: `correct` (N, F).

    Also their `latents` (N, C, H, W), and the `seconds` of processor time that sampling took.
    """
    attributes = random_attributes(count, seed, held_out)
    captions = [caption(row) for row in attributes]
    model, start = load(config, ckpt), time.process_time()
    latents = sample(model, [captions], [seed * 100_000 + i for i in range(count)], sampling)
    seconds = time.process_time() - start
    images = decode(model, latents)
    correct = load_judge(classifier).read(images) == attributes
    measured = {"correct": correct.numpy(), "latents": latents.numpy(), "seconds": np.array(seconds)}
    return measured | {"images": to_bytes(images), "captions": np.array(captions)}


@torch.no_grad()
def judge_itself(config: str, ckpt: str, classifier: str, seed: int, count: int, held_out: bool) -> Result:
    """Return whether the classifier reads rendered images, and their reconstructions, right: bool (N, F)."""
    attributes = random_attributes(count, seed, held_out)
    images = render(attributes, range(seed * 100_000, seed * 100_000 + count))
    model, judge = load(config, ckpt), load_judge(classifier)
    reconstructed = torch.cat(
        [model.decode_first_stage(model.scale_factor * encode(model, part)).cpu() for part in images.split(64)]
    )
    return {
        "rendered": (judge.read(images) == attributes).numpy(),
        "reconstructed": (judge.read(reconstructed) == attributes).numpy(),
    }
