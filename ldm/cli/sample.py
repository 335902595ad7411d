"""`scripts/txt2img.py` and `scripts/img2img.py`: flags and files to a `Request`, and its images to PNG files.

Flags, files and choices are checked before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import Parser, add_field_flag, add_flag, check_paths, log_to_terminal, path, script_parser
from ldm.cli.prompts import concept_files, read_prompts, read_stages, seeds
from ldm.files.hub import is_hub
from ldm.files.shipped import MODELS, name_of, shipped
from ldm.files.writing import check_writable, writing_to
from ldm.request import FAST, PLACEHOLDER, ModelFacts, Request, model_facts, read_scale, shown

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.latent_diffusion import DiffusionModel

logger = logging.getLogger(__name__)

# What makes the model, recorded in an image beside the request.
MODEL_DEFAULTS = {"config": MODELS["demo"].config, "ckpt": MODELS["demo"].ckpt, "dtype": "float32"}
DTYPES = ("float32", "float16", "bfloat16")
TEXTS = ("prompt", "prospect_words", "preset")
MAX_IMAGES = 1000  # of one command with several prompts and seeds
Layout = tuple[str, str, str]
OWN_LAYOUT: Layout = ("{stem}-{seed}", "{stem}-{seed}-grid", ".png")
# Where other programs leave an image and its grid: templates of paths, and the format.
LAYOUTS = {
    "neti": ("{prompt}/{seed}{truncated}", "{prompt}{truncated}", ".png"),
    "catversion": ("{dashed}/{dashed}_{seed}", "{dashed}/{dashed}", ".jpg"),
}


# --- flags -----------------------------------------------------------------------------------------------------


def build_parser(docstring: str | None, editing: bool | None, prog: str | None = None) -> Parser:
    """Return the flags; those of a `Request` have its field's name as `dest`."""
    parser = script_parser(docstring, prog)
    what = parser.add_argument_group("what to show")
    if editing is not False:
        add_field_flag(what, Request, "content_dir", "--content", metavar="FILE")
        add_field_flag(what, Request, "strength")
        add_field_flag(what, Request, "resize", metavar="HOW")
    help_prompt = "what to show, * standing for the concept; given several times, an image of each and a grid"
    add_field_flag(what, Request, "prompt", action="append", help=help_prompt)
    help_prompts = (
        "text with a prompt in each line, {} standing for the concept; or YAML: a list of prompts or of {argument: "
        "value, …}"
    )
    add_flag(what, "--prompts", type=path, metavar="FILE", help=help_prompts)
    add_field_flag(what, Request, "negative_prompt")
    add_stage_flags(what)
    help_layers = "texts that replace * by U-Net layer (P+), in order of execution; numbers for learned tokens"
    add_field_flag(what, Request, "layer_words", nargs="+", type=word, metavar="TEXT", help=help_layers)
    help_concept = "learned embedding, or hf:user/name[@revision]; several: '<vase>=FILE', each named in the prompt"
    add_flag(what, "--concept", action="append", metavar="[NAME=]FILE", help=help_concept)
    add_field_flag(what, Request, "any_base")
    add_flag(what, "--from", dest="source", type=path, metavar="PNG", help="repeat this image; other flags change it")

    how = parser.add_argument_group("how")
    fast = f"{FAST['sampler']} with {FAST['ddim_steps']} steps: two fifths of the U-Net calls of the default"
    add_flag(how, "--fast", action="store_true", help=fast)
    add_field_flag(how, Request, "ddim_steps", "--steps")
    add_field_flag(how, Request, "ddim_eta", "--eta")
    help_seeds = "one or several, also ranges (10-13); several give an image of each and a grid (42)"
    add_field_flag(how, Request, "seed", nargs="+", type=seeds, help=help_seeds)
    add_field_flag(how, Request, "truncation", nargs="+", metavar="N")
    add_field_flag(how, Request, "scale", type=str, metavar="X[,STAGES:X…]")
    for name in ("rescale", "sampler", "spacing", "n_samples", "n_iter", "n_rows", "height", "width"):
        add_field_flag(how, Request, name)
    add_field_flag(how, Request, "legacy_word_tokens")

    model = parser.add_argument_group("model and files")
    add_model_flags(model)
    add_flag(model, "--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    help_layout = f"name files as another program does: {', '.join(LAYOUTS)} (its JPEGs have no record of the flags)"
    add_flag(model, "--layout", choices=list(LAYOUTS), metavar="NAME", help=help_layout)
    add_flag(model, "--debug", action="store_true", help="show the whole trace of an error")
    return parser


def add_model_flags(group: argparse._ActionsContainer) -> None:
    """Add what says which model generates; by default the small one that ships."""
    help_config = "of the base model: demo (the small model), sd (Stable Diffusion v1) or a file (demo)"
    add_flag(group, "--config", metavar="NAME|YAML", help=help_config)
    help_ckpt = f".ckpt, .safetensors or diffusers folder (demo: {MODELS['demo'].ckpt}, sd: {MODELS['sd'].ckpt})"
    add_flag(group, "--ckpt", type=path, metavar="FILE", help=help_ckpt)
    add_flag(group, "--dtype", metavar="TYPE", help="of the weights: float32, float16 or bfloat16 (float32)")
    help_device = "cpu, cuda, cuda:1 or mps (PROSPECT_DEVICE, or the fastest there is)"
    add_flag(group, "--device", type=device, metavar="NAME", help=help_device)
    help_allow = "packages of your own whose classes the configuration may name"
    add_flag(group, "--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=help_allow)
    help_resolvers = "let the configuration use resolvers, such as ${oc.env:HOME}"
    add_flag(group, "--allow_resolvers", action="store_true", help=help_resolvers)


def add_stage_flags(group: argparse._ArgumentGroup) -> None:
    """Add --stages and --preset, of which one can be given."""
    stages = group.add_mutually_exclusive_group()
    help_stages = (
        "texts that replace * by stage, 0 being the end of sampling: '7-9=a mug' '0-6=a blue mug', open ranges (5-), "
        "numbers for learned tokens (0-4=3); or preset:ATTRIBUTE"
    )
    add_flag(stages, "--stages", nargs="+", action="extend", metavar="RANGE=TEXT", help=help_stages)
    add_field_flag(stages, Request, "preset", metavar="ATTRIBUTE")


def word(text: str) -> str | int:
    """An entry of `layer_words`: a number is the learned token of that layer, anything else a text."""
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def device(text: str) -> str:
    """A device's name: cpu, mps, cuda or cuda:N."""
    if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, mps, cuda and cuda:0, cuda:1, …")
    return text


# --- from flags and files to a request -------------------------------------------------------------------------


def run(
    docstring: str | None, editing: bool | None = False, argv: Sequence[str] | None = None, prog: str | None = None
) -> list[Path]:
    """Generate (or edit, with `editing`) what the flags ask for.

    Args:
        docstring: the command's; its first line, then examples.
        editing: whether an image is edited; None leaves that to --content.
        argv: the flags, by default the program's own.
        prog: what the command is called, by default like its file.

    Returns:
        The files written: the image, or the grid followed by its single images.
    """
    parser = build_parser(docstring, editing, prog)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=["ldm.conditioning.presets"])
    with parser.sentences(options.debug):
        return _generate(options, editing)


def _generate(options: argparse.Namespace, editing: bool | None) -> list[Path]:
    recorded = _recorded(options)
    setup = model_setup(options, recorded)
    from ldm.config import allow_targets, check_generates, load_config

    allow_targets(*options.allow_targets)
    config = load_config(setup["config"], flag="--config", resolvers=options.allow_resolvers)
    check_generates(config)
    facts = model_facts(config)
    rows = build_requests(options, recorded, facts)
    if options.layout == "catversion" and len(rows) * len(_columns(options)) > 1:
        raise ValueError(f"--layout {options.layout} goes with one prompt and one seed; --n_iter makes several images.")
    for request in rows:
        _check_purpose(request, editing)
        _check_files(request, setup["ckpt"])
    check_writable(options.outdir, "--outdir")

    from ldm.embeddings import load_concept, refuse_other_width
    from ldm.generate import load_model_from_config

    # a file that is no concept ends here, before the weights are read
    named = {(name, file) for request in rows for name, file in (request.concepts or {}).items()}
    loaded = {(name, file): load_concept(file, name) for name, file in sorted(named)}
    for (name, _), concept in loaded.items():
        refuse_other_width(concept, name, facts.token_width, Path(setup["ckpt"]).name)
    rows = [
        replace(row, concepts={name: loaded[name, file] for name, file in (row.concepts or {}).items()}) for row in rows
    ]
    model = load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"])
    columns, layout = _columns(options), LAYOUTS.get(options.layout, OWN_LAYOUT)
    if options.layout == "neti":
        every = [replace(row, **column) for row in rows for column in columns]
        return draw_and_group(every, model, recorded, setup, options.outdir, layout)
    if len(rows) * len(columns) > 1:
        return Sheet(model, recorded, setup, options.outdir).draw(rows, columns)
    return draw(replace(rows[0], **columns[0]), model, recorded, setup, options.outdir, layout)


def _columns(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs from image to image of a prompt: truncations and seeds, where flags give them."""
    given = {"truncation": options.truncation, "seed": options.seed and list(chain.from_iterable(options.seed))}
    several = {name: values for name, values in given.items() if values}
    return [dict(zip(several, values, strict=True)) for values in product(*several.values())]


def draw(
    request: Request,
    model: DiffusionModel,
    recorded: Mapping[str, Any],
    setup: Mapping[str, str],
    folder: Path,
    layout: Layout = OWN_LAYOUT,
) -> list[Path]:
    """Generate what a request asks for and write it.

    Raises:
        KeyboardInterrupt: Ctrl-C, with a sentence where some batches are finished; these are written.
    """
    from ldm.generate import Interrupted, generate_image

    try:
        image = generate_image(request, model)
    except Interrupted as stop:
        paths = save_images(stop.image, recorded, setup, folder, layout)
        kept = "is kept" if len(paths) == 1 else f"and the {len(paths) - 1} images in it are kept"
        raise KeyboardInterrupt(f"stopped by Ctrl-C; what was finished, '{paths[0]}', {kept}") from stop
    return save_images(image, recorded, setup, folder, layout)


def draw_and_group(
    requests: Sequence[Request],
    model: DiffusionModel,
    recorded: Mapping[str, Any],
    setup: Mapping[str, str],
    folder: Path,
    layout: Layout,
) -> list[Path]:
    """Generate and write what requests ask for, and a grid of all images that have the same name in the layout.

    Returns:
        The grids, then the single images.
    """
    from PIL import Image

    from ldm.files.images import make_grid
    from ldm.files.records import PNG_KEY

    single, grid, suffix = layout
    groups: dict[str, list[Path]] = {}
    for request in requests:
        paths = draw(request, model, recorded, setup, folder, (single, "", suffix))
        record = json.loads(Image.open(paths[0]).info[PNG_KEY])
        groups.setdefault(grid.format(**_names(record)), []).extend(paths)
    grids = []
    for name, paths in groups.items():
        record = {"cells": [[path.relative_to(folder).as_posix() for path in paths]]}
        grids.append(_write(make_grid([Image.open(path) for path in paths]), folder / name, suffix, record))
    return [*grids, *chain.from_iterable(groups.values())]


@dataclass(frozen=True)
class Sheet:
    """Several prompts, truncations and seeds: an image of each, and a labelled grid with a row for each prompt.

    Args:
        model, recorded, setup, folder: as for `draw`.
    """

    model: DiffusionModel
    recorded: Mapping[str, Any]
    setup: Mapping[str, str]
    folder: Path

    def draw(self, rows: Sequence[Request], columns: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write all images, and the grid, which is the first of the files returned."""
        from PIL import Image

        from ldm.files.images import label_grid
        from ldm.files.records import PNG_KEY

        written: list[list[list[Path]]] = []
        for row in rows:
            written.append([])
            for column in columns:
                written[-1].append(self._cell(replace(row, **column), sum(map(len, written))))
        cells = [[paths[0] for paths in row] for row in written]
        images = [[Image.open(path) for path in row] for row in cells]
        names = [f"{row.prompt} ({row.preset})" if row.preset else row.prompt or "no prompt" for row in rows]
        heads = [", ".join(f"{name} {value}" for name, value in column.items()) for column in columns]
        grid = label_grid(images, names, heads if any(heads) else [])
        stem = f"{_stem(json.loads(images[0][0].info[PNG_KEY]))}-{'prompts' if len(rows) > 1 else 'seeds'}"
        record = {"cells": [[path.name for path in row] for row in cells]}
        return [_write(grid, self.folder / stem, ".png", record), *chain.from_iterable(chain.from_iterable(written))]

    def _cell(self, request: Request, done: int) -> list[Path]:
        try:
            return draw(request, self.model, self.recorded, self.setup, self.folder)
        except KeyboardInterrupt as stop:
            if not done or str(stop):
                raise
            raise KeyboardInterrupt(f"stopped by Ctrl-C; {done} images in '{self.folder}' are kept") from stop


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the image of `--from`; empty without one.

    Raises:
        ValueError: there is no such image, it has no record, or its model is to be given.
    """
    if options.source is None:
        return {}
    if not options.source.exists():
        raise ValueError(f"There is no file '{options.source}'; check the path given with --from.")
    from ldm.files.records import read_parameters

    recorded = read_parameters(options.source)
    if "cells" in recorded:
        raise ValueError(f"'{options.source}' shows images of several commands; repeat one of its single images.")
    name = recorded.get("base_model")
    if "ckpt" not in recorded and options.ckpt is None and name != Path(MODEL_DEFAULTS["ckpt"]).name:
        raise ValueError(f"'{options.source}' was made with the model {shown(name)}; give it with --ckpt and --config.")
    return recorded


def model_setup(options: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return configuration, checkpoint and precision: of the flags, else of the record, else the small model's."""
    given: dict[str, Any] = {}
    if options.config in MODELS:
        known = MODELS[options.config]
        given = {"config": known.config, "ckpt": known.ckpt}
    elif options.config is not None:
        given = {"config": os.path.expanduser(options.config)}
    given |= {name: value for name in ("ckpt", "dtype") if (value := getattr(options, name)) is not None}
    setup = {}
    for name, default in MODEL_DEFAULTS.items():
        value = given.get(name) or recorded.get(name) or default
        if not isinstance(value, (str, Path)):
            raise ValueError(f"'{options.source}' has no readable {name} ({shown(value)}); give it with --{name}.")
        setup[name] = shipped(value)
    if setup["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(setup['dtype'])}.")
    return setup


def build_requests(options: argparse.Namespace, recorded: Mapping[str, Any], facts: ModelFacts) -> list[Request]:
    """Return a request for each prompt. Precedence, lowest first: the record of `--from`, the file of prompts, flags.

    Raises:
        ValueError: an unknown argument, or a value that cannot be used; with the remedy.
    """
    names = [field.name for field in fields(Request)]
    flags = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    flags = (FAST if options.fast else {}) | flags
    prompts = flags.pop("prompt", None)
    columns = _columns(options)
    flags |= columns[0]
    if options.stages is not None:
        flags |= read_stages(options.stages, facts.num_stages)
    if options.scale is not None:
        flags["scale"] = read_scale(options.scale, facts.num_stages, facts.scale)
    rows = [{"prompt": prompt} for prompt in prompts] if prompts else [{}]
    if options.prompts is not None:
        if prompts:
            raise ValueError("--prompts FILE takes the place of --prompt; give one of them.")
        rows = read_prompts(options.prompts, names, facts.num_stages)
    if (count := len(rows) * len(columns)) > MAX_IMAGES:
        raise ValueError(f"{count} images are too many for one command, which makes at most {MAX_IMAGES}; give fewer.")
    repeated = {name: recorded[name] for name in names if name in recorded and name != "preset"}
    texts = " ".join(str(given["prompt"]) for given in [*rows, repeated] if "prompt" in given)
    if "content_dir" in flags:
        flags["content_dir"] = shipped(flags["content_dir"])
    if options.concept:
        flags["concepts"] = concept_files(options.concept, facts.placeholder or PLACEHOLDER, texts)
    if options.prompts is not None:
        name = next(iter(flags.get("concepts", ())), facts.placeholder or PLACEHOLDER)
        rows = [row | {"prompt": row["prompt"].replace("{}", name)} if _is_text(row) else row for row in rows]
    return [_request(options.source, recorded, repeated, given | flags).for_model(facts) for given in rows]


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), str)


def _request(
    source: Path | None, recorded: Mapping[str, Any], repeated: Mapping[str, Any], given: Mapping[str, Any]
) -> Request:
    if "preset" in recorded and "prospect_words" not in given and len({"prompt", "preset"} & given.keys()) == 1:
        raise ValueError(
            f"'{source}' was made with a preset; to show something else, give both --prompt and --preset, or --stages."
        )
    if given.get("preset") is not None:
        repeated = {name: value for name, value in repeated.items() if name != "prospect_words"}
    if "sampler" in given:
        repeated = {name: value for name, value in repeated.items() if name != "spacing"}
    arguments = {**repeated, **given}
    if arguments.get("prospect_words") is not None or arguments.get("layer_words") is not None:
        arguments.setdefault("prompt", PLACEHOLDER)
    if "prompt" not in arguments and not arguments.get("content_dir"):
        raise ValueError("Say what to show: --prompt TEXT, or --prompts FILE.")
    return Request(**arguments)


def _check_purpose(request: Request, editing: bool | None) -> None:
    if editing and request.content_dir is None:
        raise ValueError("Give the image to edit with --content FILE; without one, use scripts/txt2img.py.")
    if editing is False and request.content_dir is not None:
        raise ValueError("Here images come from noise; to edit one (content_dir), use scripts/img2img.py.")


def _check_files(request: Request, ckpt: str) -> None:
    if ckpt == MODELS["sd"].ckpt and not os.path.exists(ckpt):
        raise ValueError(f"Stable Diffusion's weights, '{ckpt}', are not there; put them there, or give --ckpt FILE.")
    concepts = [file for file in (request.concepts or {}).values() if not is_hub(file)]
    check_paths({"--ckpt": [ckpt], "--concept": concepts, "--content": [request.content_dir]})


# --- from images to files --------------------------------------------------------------------------------------


def save_images(
    image: Image.Image,
    repeated: Mapping[str, Any],
    setup: Mapping[str, str],
    folder: Path,
    layout: Layout = OWN_LAYOUT,
) -> list[Path]:
    """Write the image, or a grid and its single images, each with what repeats it."""
    from ldm.files.records import PNG_KEY

    record = json.loads(image.info[PNG_KEY])
    _warn_of_changes(repeated, record)
    if repeated.get("preset") and "preset" not in record and all(record[n] == repeated.get(n) for n in TEXTS[:2]):
        record |= {key: value for key, value in repeated.items() if key.startswith("preset")}
    record |= {name: name_of(value) for name, value in setup.items()}
    single, grid, suffix = layout
    height, width, seed = record["height"], record["width"], record["seed"]
    names = _names(record)
    count = record["n_iter"] * record["n_samples"]
    written: list[Path] = []
    if grid and (count > 1 or layout is not OWN_LAYOUT):
        written = [_write(image, folder / grid.format(seed=seed, **names), suffix, record)]
    for i in range(count):
        row, column = divmod(i, image.width // width)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        alone = record | {"seed": seed + i, "n_iter": 1, "n_samples": 1, "n_rows": 0}
        file = folder / single.format(seed=seed + i, **names)
        written.append(_write(image.crop(box), file, suffix, record if count == 1 else alone))
    return written


def _warn_of_changes(repeated: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Warn where files of the image of `--from` are others now."""
    was, is_now = repeated.get("concept_hashes"), record["concept_hashes"]
    if isinstance(was, Mapping) and isinstance(repeated.get("concepts"), Mapping):
        for name, file in record["concepts"].items():
            if repeated["concepts"].get(name) == file and name in was and was[name] != is_now.get(name):
                logger.warning(
                    "The concept '%s' (%s) is another file than the one that the image was made with.", name, file
                )
    content, was = record["content_dir"], repeated.get("content_hash")
    if content and was and content == repeated.get("content_dir") and was != record["content_hash"]:
        logger.warning("The content image '%s' is another than the one that was edited.", content)


def _stem(record: Mapping[str, Any]) -> str:
    """A file name for an image: of its prompt, its preset and its truncation."""
    words = next((word for word in record["prospect_words"] or [] if isinstance(word, str)), "")
    name = re.sub(r"\W+", "-", record["prompt"].replace(PLACEHOLDER, words))[:40].strip("-") or "image"
    if (preset := record.get("preset")) and isinstance(preset, str):
        name = f"{name}-{re.sub(r'[^a-z]+', '-', preset)}"
    return name if record.get("truncation") is None else f"{name}-truncation-{record['truncation']}"


def _names(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the templates of a layout."""
    prompt, truncation = record["prompt"], record.get("truncation")
    truncated = "" if truncation is None else f"_truncation_{truncation}"
    kept = r'[/\\\0<>:"|?*]' if os.name == "nt" else r"[/\0]"
    names = {"stem": _stem(record), "truncated": truncated}
    return names | {"dashed": _file_name(prompt, r"[\s/\\:]"), "prompt": _file_name(prompt, kept)}


def _file_name(prompt: str, unusable: str) -> str:
    """The prompt as a name, with dashes for characters that have no place there."""
    name = re.sub(unusable, "-", prompt).lstrip(".").strip() or "image"
    return name.encode()[:200].decode(errors="ignore")


def _write(image: Image.Image, path: Path, suffix: str, record: Mapping[str, Any]) -> Path:
    from ldm.files.writing import replacing
    from ldm.generate import PNG_KEY, save_picture

    image.info[PNG_KEY] = json.dumps(record)
    file = new_file(path, suffix)
    try:
        if suffix == ".png":
            save_picture(image, file)
        else:
            with replacing(file) as temporary:
                image.save(temporary, format="JPEG")
    except BaseException:  # Ctrl-C, too
        file.unlink(missing_ok=True)
        raise
    return file


def new_file(path: Path, suffix: str = ".png") -> Path:
    """An empty file made at `path` with the suffix, or with the first free number before it."""
    number = 1
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.with_name(f"{path.name}{suffix}" if number == 1 else f"{path.name}-{number}{suffix}")
            try:
                file.touch(exist_ok=False)  # so that two programs at once do not take the same name
                return file
            except FileExistsError:
                number += 1
