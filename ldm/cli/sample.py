"""What `scripts/txt2img.py` and `scripts/img2img.py` share: flags and files to arguments of `ldm.generate.main`.

Nothing heavy is imported before the flags are read, so that `--help` answers at once, and every argument is checked
before the weights are read.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.sampling_arguments import (
    PRESET,
    given_arguments,
    recorded_arguments,
    warn_of_changed_concepts,
    warn_of_changed_content,
)
from ldm.cli.sampling_flags import MODEL_DEFAULTS, build_parser
from ldm.files.writing import check_writable, writing_to
from ldm.native import Native, native

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion


def run(description: str, editing: bool = False, argv: Sequence[str] | None = None) -> list[Path]:
    """Generate (or edit, with `editing`) what the flags ask for.

    Args:
        description: the script's docstring; its first line, then examples.
        argv: the flags, by default the program's own.

    Returns:
        The files written: the picture, or the grid followed by its single pictures.
    """
    parser = build_parser(description, editing)
    options = parser.parse_strictly(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with parser.sentences(options.debug):
        return _generate(options, editing)


def _generate(options: argparse.Namespace, editing: bool) -> list[Path]:
    from ldm.checkpoint import base_model_of
    from ldm.config import allow_targets, check_generates, load_config
    from ldm.generate import Interrupted, load_model_from_config, main

    recorded = recorded_arguments(options)
    setup = {key: getattr(options, key) or recorded.get(key, default) for key, default in MODEL_DEFAULTS.items()}
    for name, value in setup.items():
        if not isinstance(value, str):
            raise ValueError(f"'{options.source}' has no readable {name} ({value!r}); give it with --{name}.")
    allow_targets(*options.allow_targets)
    config = load_config(setup["config"], flag="--config")
    check_generates(config)
    outline = model_outline(config, setup["dtype"])
    if outline.embedding_manager is not None:
        outline.embedding_manager.base_model = base_model_of(setup["ckpt"])
    arguments, made_of = given_arguments(options, recorded, outline, setup["ckpt"])
    arguments |= native(config).filled(**{name: arguments.get(name) for name in Native._fields})
    check_writable(options.outdir, "--outdir")
    _check(arguments, outline, editing)
    warn_of_changed_content(recorded, arguments.get("content_dir"))
    if outline.embedding_manager is not None:
        warn_of_changed_concepts(recorded, arguments.get("concepts") or {}, outline.embedding_manager.hashes)
    model = load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"])
    also = setup | made_of
    try:
        return _save(main(model=model, **arguments), also, options.outdir)
    except Interrupted as stop:
        paths = _save(stop.picture, also, options.outdir)
        kept = "is kept" if len(paths) == 1 else f"and the {len(paths) - 1} pictures in it are kept"
        raise KeyboardInterrupt(f"stopped by Ctrl-C; what was finished, '{paths[0]}', {kept}") from stop


def model_outline(config: DictConfig, dtype: str) -> LatentDiffusion:
    """The configured model without weights, to check arguments against; it needs no memory."""
    import torch
    from omegaconf import OmegaConf

    from ldm.config import instantiate_from_config
    from ldm.models.diffusion.schedule import make_betas, schedule_buffers

    config = config.copy()
    for key in ("ckpt_path", "first_stage_ckpt", "cond_stage_ckpt", "embedding_manager_ckpt"):
        OmegaConf.update(config, f"model.params.{key}", None)
    OmegaConf.update(config, "model.params.frozen_dtype", dtype)
    if config.model.params.get("personalization_config") is not None:
        OmegaConf.update(config, "model.params.personalization_config.params.initializer_words", None)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    # samplers read the schedule; only its length matters here
    schedule = schedule_buffers(make_betas(0.00085, 0.012, model.num_timesteps))
    model.load_state_dict(schedule, strict=False, assign=True)
    return model


def _check(arguments: Mapping[str, Any], outline: LatentDiffusion, editing: bool) -> None:
    """Everything that can be wrong with the arguments of `main`, found without weights.

    Raises:
        ValueError, OSError: one sentence with the remedy.
    """
    from ldm.conditioning.prompts import check_negative_prompt, check_prompt, check_words
    from ldm.generate import SAMPLERS, check_arguments, main, open_content

    content, concepts, words = (arguments.get(name) for name in ("content_dir", "concepts", "prospect_words"))
    if not editing and content is not None:
        raise ValueError("Here pictures come from noise; to edit one (content_dir), use scripts/img2img.py.")
    if editing and not content:
        raise ValueError("Give the picture to edit with --content FILE; without one, use scripts/txt2img.py.")
    if "prompt" not in arguments and not editing:
        raise ValueError("Say what to show: --prompt TEXT, or --words FILE.")
    check_prompt(arguments.get("prompt", ""))
    parameters = inspect.signature(main).parameters
    checked = [name for name in inspect.signature(check_arguments).parameters if name != "model"]
    checked = {name: arguments.get(name, parameters[name].default) for name in checked}
    check_arguments(outline, **checked)
    sampler = SAMPLERS[checked["sampler"]](outline)
    sampler.make_schedule(checked["ddim_steps"], ddim_eta=checked["ddim_eta"], verbose=False)
    if words is not None:
        check_words(words, outline.num_stages)
    if concepts:
        if outline.embedding_manager is None:
            raise ValueError("The configuration has no personalization_config, so --concept cannot be used with it.")
        outline.embedding_manager.load(concepts, arguments.get("any_base", False))
    check_negative_prompt(arguments.get("negative_prompt", ""), concepts or ())
    if content is not None:
        open_content(content)
    outline.cond_stage_model.tokenizer  # noqa: B018, opens it, which fails where it is not on this machine


def _save(result: Image.Image, also: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the picture, or a grid and its single pictures, each with what repeats it.

    Args:
        also: what the record holds beside the arguments of `main`: the model, and what the words were made of.
    """
    from ldm.generate import PNG_KEY, save_picture

    record = json.loads(result.info[PNG_KEY]) | also
    height, width, seed = record["height"], record["width"], record["seed"]
    words = next((word for word in record["prospect_words"] or [] if isinstance(word, str)), "")
    name = re.sub(r"\W+", "-", record["prompt"].replace("*", words))[:40].strip("-") or "picture"
    if preset := re.sub(r"\W+", "-", record.get(PRESET, "")):
        name = f"{name}-{preset}"
    count = record["n_iter"] * record["n_samples"]

    def save(picture: Image.Image, stem: str, record: Mapping[str, Any]) -> Path:
        picture.info[PNG_KEY] = json.dumps(record)
        path = _new_file(folder, stem)
        try:
            save_picture(picture, path)
        except BaseException:  # Ctrl-C, too
            path.unlink(missing_ok=True)
            raise
        return path

    if count == 1:
        return [save(result, f"{name}-{seed}", record)]
    paths = [save(result, f"{name}-{seed}-grid", record)]
    for i in range(count):
        row, column = divmod(i, result.width // width)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        alone = record | {"seed": seed + i, "n_iter": 1, "n_samples": 1, "n_rows": 0}
        paths.append(save(result.crop(box), f"{name}-{seed + i}", alone))
    return paths


def _new_file(folder: Path, stem: str) -> Path:
    """An empty file made at `folder/stem.png`, or with the first free number behind it."""
    number = 1
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                path.touch(exist_ok=False)  # so that two programs at once do not take the same name
                return path
            except FileExistsError:
                number += 1
