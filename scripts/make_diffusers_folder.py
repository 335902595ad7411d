"""Write a base model as a diffusers folder, for the script that export_embedding.py --to diffusers writes.

python scripts/make_diffusers_folder.py outputs/demo-diffusers
python scripts/make_diffusers_folder.py sd-v1-4 --config configs/stable-diffusion/v1-inference.yaml \\
    --ckpt models/sd/sd-v1-4.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import path, script_parser
from ldm.cli.models import MODEL_DEFAULTS
from ldm.files.shipped import shipped
from ldm.files.writing import replacing_set

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def build_pipeline(config: str | Path, ckpt: str | Path) -> StableDiffusionPipeline:
    """Return a float32 pipeline with the sizes and schedule of a configuration, and the weights of a checkpoint.

    Raises:
        ConfigError, CheckpointError, ValueError: they cannot be read, or do not fit each other.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from omegaconf import OmegaConf

    from ldm.config import load_config
    from ldm.export.diffusers_networks import build_networks
    from ldm.files.diffusers_layout import to_compvis
    from ldm.generate import load_model_from_config

    model = load_model_from_config(config, ckpt, device="cpu")
    params: Any = OmegaConf.to_container(load_config(config).model.params)
    resolution = params["first_stage_config"]["params"]["ddconfig"]["resolution"]
    parts = build_networks(model, params["unet_config"]["params"], resolution)
    tokenizer = model.cond_stage_model.tokenizer
    tokenizer.model_max_length = model.cond_stage_model.max_length
    weights = model.state_dict()
    with torch.no_grad():  # their own tensors under our names
        for name, tensor in to_compvis({part: module.state_dict() for part, module in parts.items()}).items():
            tensor.copy_(weights[name])
    scheduler = DDIMScheduler(
        num_train_timesteps=model.num_timesteps,
        beta_schedule="scaled_linear",
        beta_start=params.get("linear_start", 0.00085),
        beta_end=params.get("linear_end", 0.0120),
        prediction_type="v_prediction" if model.parameterization == "v" else "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        **{part: module.eval() for part, module in parts.items()},
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = script_parser(__doc__)
    help_folder = "the folder to write, without a safety checker; needs `pip install diffusers`"
    parser.add_argument("folder", type=path, help=help_folder)
    for name in ("config", "ckpt"):
        default = MODEL_DEFAULTS[name]
        parser.add_argument(f"--{name}", type=shipped, default=default, metavar="FILE", help=f"({default})")
    parser.run(write, None)


def write(options: argparse.Namespace) -> list[Path]:
    if options.folder.exists():
        raise ValueError(f"'{options.folder}' is there already; name another folder.")
    pipeline: Any = build_pipeline(options.config, options.ckpt)
    with replacing_set(options.folder) as staging:
        pipeline.save_pretrained(staging)
    return [options.folder]


if __name__ == "__main__":
    main()
