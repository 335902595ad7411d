"""A learned concept in diffusers, with a prompt for each stage of denoising.

python FILE BASE_MODEL    (a Stable Diffusion v1 file, or a diffusers folder) writes NAME.png

Exported by ProSpect; needs `pip install diffusers transformers`. The embedding files must be in this file's folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# What was exported: the identity of each concept, and its files. Entry 0 of PROMPTS, and of GUIDANCE where that is a
# list, is the end of sampling.
NAME = "concept"
CONCEPTS: dict[str, str] = {}
FILES: list[str] = []
PROMPTS: list[str] = ["an image"]
NEGATIVE = ""
STEPS, SEED = 50, 42
GUIDANCE: float | list[float] = 10.0
RESCALE = 0.0
SAMPLER, SPACING = "ddim", "leading"
HEIGHT, WIDTH = 512, 512


class StagePrompts:
    """Prompt and guidance of each timestep: call `at`, and give the object as `callback_on_step_end`."""

    def __init__(self, pipe: Any, guidance: float | list[float]) -> None:
        self.timesteps = pipe.scheduler.config.num_train_timesteps
        self.scales = guidance if isinstance(guidance, list) else [guidance] * len(PROMPTS)
        guided = max(self.scales) > 1
        self.encoded = {
            text: pipe.encode_prompt(text, pipe.device, 1, guided, NEGATIVE) for text in dict.fromkeys(PROMPTS)
        }

    def at(self, timestep: float) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """(prompt_embeds, negative_prompt_embeds, guidance scale) of a timestep's stage."""
        stage = int(timestep) * len(PROMPTS) // self.timesteps
        return *self.encoded[PROMPTS[stage]], self.scales[stage]

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called after a step, so what is put here is for the NEXT timestep."""
        later = pipe.scheduler.timesteps[step + 1 :]
        if len(later):
            copies = len(tensors["prompt_embeds"]) // (2 if pipe.do_classifier_free_guidance else 1)
            before, now = self.at(float(timestep)), self.at(float(later[0]))
            if before[0] is not now[0] or before[2] != now[2]:
                pipe.scheduler.lower_order_nums = 0  # an earlier prediction for another prompt tells a solver nothing
            positive, negative, pipe._guidance_scale = now  # at 1, nothing else is predicted
            both = [positive] if negative is None or not pipe.do_classifier_free_guidance else [negative, positive]
            tensors["prompt_embeds"] = torch.cat(both).repeat_interleave(copies, dim=0)
        return tensors


def load(pipe: Any) -> None:
    """Add the learned tokens to the pipeline's tokenizer and text encoder; other files than this script's end it."""
    folder = Path(__file__).parent
    for file in FILES:
        with safe_open(folder / file, framework="pt") as opened:
            if (opened.metadata() or {}).get("prospect.concept") != CONCEPTS[file.rpartition("-")[0]]:
                sys.exit(f"'{file}' is of another export than this script; export the concept again.")
        pipe.load_textual_inversion(folder, weight_name=file)


def generate(pipe: Any, steps: int = STEPS, guidance: float | list[float] = GUIDANCE, **others: Any) -> Any:
    """Call the pipeline; `others` are more of its arguments. Any scheduler will do."""
    prompts = StagePrompts(pipe, guidance)
    pipe.scheduler.set_timesteps(steps)
    positive, negative, scale = prompts.at(float(pipe.scheduler.timesteps[0]))
    return pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_rescale=RESCALE,
        callback_on_step_end=prompts,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **others,
    )


def scheduler(config: Any) -> Any:
    """Return the sampler that was exported, with the schedule that images are made with there."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    wanted = {"timestep_spacing": SPACING, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    if SAMPLER != "dpmpp_2m":
        return DDIMScheduler.from_config(config, **wanted)
    own = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "use_karras_sigmas": False}
    return DPMSolverMultistepScheduler.from_config(config, **wanted, **own)


def main() -> None:
    from diffusers import StableDiffusionPipeline

    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} BASE_MODEL")
    source = Path(sys.argv[1])
    read = StableDiffusionPipeline.from_pretrained if source.is_dir() else StableDiffusionPipeline.from_single_file
    pipe = read(str(source))
    pipe.scheduler = scheduler(pipe.scheduler.config)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    load(pipe)
    noise = torch.Generator().manual_seed(SEED)
    image = generate(pipe, height=HEIGHT, width=WIDTH, generator=noise).images[0]
    file, number = Path(f"{NAME}.png"), 1
    while file.exists():
        number += 1
        file = Path(f"{NAME}-{number}.png")
    image.save(file)
    sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
