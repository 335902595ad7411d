"""Write a base model as a diffusers folder, for the script that export_embedding.py --to diffusers writes.

  python scripts/make_diffusers_folder.py outputs/demo-diffusers
  python scripts/make_diffusers_folder.py sd-v1-4 --config configs/stable-diffusion/v1-inference.yaml \\
      --ckpt models/sd/sd-v1-4.ckpt

Needs `pip install diffusers`. There is no safety checker in the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.flags import Parser, add_flag
from ldm.sampling_flags import MODEL_DEFAULTS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def build_pipeline(config: str | Path, ckpt: str | Path) -> StableDiffusionPipeline:
    """A float32 pipeline with the sizes and the schedule of a configuration, and the weights of a checkpoint.

    Raises:
        ConfigError, CheckpointError, ValueError: they cannot be read, or do not fit each other.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from omegaconf import OmegaConf
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.config import load_config
    from ldm.diffusers_layout import to_compvis
    from ldm.generate import load_model_from_config

    model = load_model_from_config(config, ckpt, device="cpu")
    params = OmegaConf.to_container(load_config(config).model.params)
    sizes, first_stage = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    ours = model.model.diffusion_model
    attends = [2**level in sizes["attention_resolutions"] for level in range(len(sizes["channel_mult"]))]
    unet = UNet2DConditionModel(
        sample_size=first_stage["resolution"] // model.first_stage_model.downsampling,
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        block_out_channels=[ours.model_channels * m for m in sizes["channel_mult"]],
        layers_per_block=sizes["num_res_blocks"],
        transformer_layers_per_block=sizes.get("transformer_depth", 1),
        cross_attention_dim=ours.context_dim,
        attention_head_dim=sizes["num_heads"],  # its name notwithstanding, the number of heads
        norm_num_groups=sizes.get("norm_num_groups", 32),
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    )
    levels = len(first_stage["ch_mult"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[first_stage["ch"] * m for m in first_stage["ch_mult"]],
        layers_per_block=first_stage["num_res_blocks"],
        latent_channels=first_stage["z_channels"],
        norm_num_groups=first_stage.get("norm_num_groups", 32),
        sample_size=first_stage["resolution"],
        scaling_factor=model.scale_factor,
    )
    tokenizer, text = model.cond_stage_model.tokenizer, vars(model.cond_stage_model.transformer.config)
    ends = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    tokenizer.model_max_length = model.cond_stage_model.max_length
    text_encoder = CLIPTextModel(CLIPTextConfig(**text, **ends))

    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
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
    summary, _, examples = __doc__.partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=summary, epilog="examples:\n" + examples.strip("\n"), formatter_class=raw)
    parser.add_argument("folder", type=Path, help="the folder to write")
    for name in ("config", "ckpt"):
        add_flag(parser, f"--{name}", default=MODEL_DEFAULTS[name], metavar="FILE", help=f"({MODEL_DEFAULTS[name]})")
    options = parser.parse_strictly()
    try:
        if options.folder.exists():
            raise ValueError(f"'{options.folder}' is there already; name another folder.")
        build_pipeline(options.config, options.ckpt).save_pretrained(options.folder)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    print(options.folder)


if __name__ == "__main__":
    main()
