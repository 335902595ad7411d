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
# list, is the end of sampling. Where concepts tell LAYERS cross-attention layers apart, it is a list of their texts.
NAME = "concept"
CONCEPTS: dict[str, str] = {}
FILES: list[str] = []
LAYERS = 1
PROMPTS: list[str] | list[list[str]] = ["an image"]
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
        self.texts = [tuple(entry) if isinstance(entry, list) else (entry,) for entry in PROMPTS]
        self.encoded = {texts: self.encode(pipe, texts, guided) for texts in dict.fromkeys(self.texts)}

    def encode(self, pipe: Any, texts: tuple[str, ...], guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prompt's and the negative prompt's context; of several layers, one behind the other."""
        both = [pipe.encode_prompt(text, pipe.device, 1, guided, NEGATIVE) for text in texts]
        positive, negative = zip(*both, strict=True)
        return torch.cat(positive, dim=1), torch.cat(negative, dim=1) if guided else None

    def at(self, timestep: float) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """(prompt_embeds, negative_prompt_embeds, guidance scale) of a timestep's stage."""
        stage = int(timestep) * len(PROMPTS) // self.timesteps
        return *self.encoded[self.texts[stage]], self.scales[stage]

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


class OfLayer:
    """Attention of a U-Net layer that reads its own part of a context of all layers."""

    def __init__(self, processor: Any, layer: int) -> None:
        self.processor, self.layer = processor, layer

    def __call__(self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any) -> Any:
        own = encoder_hidden_states.chunk(LAYERS, dim=1)[self.layer]
        return self.processor(attn, hidden, encoder_hidden_states=own, **others)


def layer_tokens(name: str, table: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The learned tokens of vectors (stages, layers, n, width)."""
    return [
        {f"{name}-{stage}-l{layer:02}": vectors}
        for stage, layers in enumerate(table)
        for layer, vectors in enumerate(layers)
    ]


def load(pipe: Any) -> None:
    """Add the learned tokens to the pipeline's tokenizer and text encoder; other files than this script's end it."""
    folder = Path(__file__).parent
    for file in FILES:
        with safe_open(folder / file, framework="pt") as opened:
            name = file.rpartition("-")[0]
            if (opened.metadata() or {}).get("prospect.concept") != CONCEPTS[name]:
                sys.exit(f"'{file}' is of another export than this script; export the concept again.")
            table = opened.get_tensor("table") if file.endswith("-layers.safetensors") else None
        if table is None:
            pipe.load_textual_inversion(folder, weight_name=file)
        else:
            pipe.load_textual_inversion(layer_tokens(name, table))
    if LAYERS > 1:
        named = [(name, module) for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
        named.sort(key=lambda pair: pair[0][0])  # down, mid, up: the order of execution
        for layer, (_, attention) in enumerate(named):
            attention.set_processor(OfLayer(attention.processor, layer))


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
