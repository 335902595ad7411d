"""Presets: which stages take an attribute from a learned image, as lists for `prospect_words`.

The paper's windows of stages are those of Stable Diffusion v1.4. A model for which others were measured
(`scripts/spectrum.py --write-presets`) has them in a file `presets.yaml` beside its checkpoint. Command line, notebook
and export all ask `presets_beside` of the base model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.conditioning.stages import matching_stage
from ldm.request import PLACEHOLDER, PRESETS, mentions, placeholder_pattern
from ldm.yaml_files import read_yaml

logger = logging.getLogger(__name__)

PRESETS_FILE = "presets.yaml"
PAPER = "the paper"

# Stages (of ten) in which the paper lets `*` carry an attribute of the image; the other stages follow the class
# prompt. Zhang et al. 2023, section 5 and the authors' README; for `style` they name no stages and count it with
# material, at the high-frequency end. `layout` adds `*` to the class prompt instead of putting it inside.
PRESET_STAGES: dict[str, tuple[int, ...]] = {
    "content": (0, 1, 2, 3, 4, 5, 6, 7),
    "layout": (9,),
    "material": (0, 1, 2, 3, 4),
    "style": (0, 1, 2, 3, 4),
}


class Windows(dict[str, tuple[int, ...]]):
    """Windows of presets, {attribute: stages of ten}, and where they are from: a file, or `PAPER`."""

    def __init__(self, measured: Mapping[str, Sequence[int]] | None = None, source: str = PAPER) -> None:
        super().__init__(PRESET_STAGES | {name: tuple(stages) for name, stages in (measured or {}).items()})
        self.source = source


def load_presets(path: str | Path | None) -> Windows:
    """Return the windows of a YAML file {attribute: [stages of ten]}, or for None and for what it omits the paper's.

    Raises:
        ValueError: no such file, or something else in it.
    """
    if path is None:
        return Windows()
    content = read_yaml(path, "--presets", "file of presets").content
    if not isinstance(content, dict) or not set(content) <= set(PRESETS):
        raise ValueError(f"The presets '{path}' must give lists of stages for {', '.join(PRESETS)}.")
    for attribute, stages in content.items():
        if not isinstance(stages, list) or not stages or not all(type(s) is int and 0 <= s <= 9 for s in stages):
            raise ValueError(f"The preset '{attribute}' in '{path}' must be a list of stages 0..9.")
    return Windows(content, str(path))


def presets_beside(ckpt: str | Path) -> Windows:
    """Return the windows of `presets.yaml` beside a checkpoint (inside it, if it is a folder), or the paper's.

    A file of that name that is something else stops nothing: it is reported, and the paper's windows hold.
    """
    folder = Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent
    path = folder / PRESETS_FILE
    try:
        return load_presets(path if path.is_file() else None)
    except ValueError as error:
        logger.warning("%s The paper's windows are used.", error)
        return Windows()


def preset_words(
    attribute: str,
    prompt: str,
    concepts: Sequence[str] = (),
    num_stages: int = 10,
    windows: Windows | None = None,
) -> list[str]:
    """Return the `prospect_words` of a preset for the concept that the prompt names first in `concepts`.

    Where it names none, it is the first of `concepts`, or `*`. Which concept and which stages these are is logged.

    Args:
        windows: of the model, from `presets_beside`; None is the paper's.

    Raises:
        ValueError: see `joint`.
    """
    windows = Windows() if windows is None else windows
    chosen = [*(name for name in concepts if mentions(prompt, name)), *concepts, PLACEHOLDER][0]
    if len(concepts) > 1:
        logger.warning(
            "--preset takes %s from '%s' alone; ldm.prompts.joint, in Python, takes something from each concept.",
            *(attribute, chosen),
        )
    words = preset(attribute, prompt, num_stages=num_stages, placeholder=chosen, windows=windows)
    found = preset_stages(attribute, num_stages, windows)
    stages = f"stage{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
    logger.info("The preset '%s' is %s of %d, from %s.", attribute, stages, num_stages, windows.source)
    return words


def preset(
    attribute: str,
    prompt: str,
    stages: Sequence[int] | None = None,
    num_stages: int = 10,
    placeholder: str = "*",
    windows: Mapping[str, Sequence[int]] = PRESET_STAGES,
) -> list[str]:
    """Return the `prospect_words` that take one attribute from the learned image and the rest from the text.

    `preset('material', 'a * dog on the table')` has `*` in stages 0–4, and `a dog on the table` in 5–9. A prompt
    without the placeholder gets it appended in those stages.

    Args:
        attribute: content, layout, material or style.
        stages: stages that carry the placeholder, instead of the window's.
        num_stages, windows: as for `joint`.

    Raises:
        ValueError: see `joint`.
    """
    chosen = None if stages is None else {attribute: stages}
    return joint({attribute: placeholder}, prompt, chosen, num_stages, windows)


def joint(
    concepts: Mapping[str, str],
    prompt: str = "",
    stages: Mapping[str, Sequence[int]] | None = None,
    num_stages: int = 10,
    windows: Mapping[str, Sequence[int]] = PRESET_STAGES,
) -> list[str]:
    """Return the `prospect_words` that take several attributes, each from a concept of its own.

    `joint({'content': '<a>', 'material': '<b>', 'layout': '<c>'}, 'a <b> <a> thing')` has `<c>` behind `a thing` in
    stage 9, `<a>` in its place in 5–7, `<b>` in 0–4, and `a thing` in 8. Material and style stand beside each other;
    content gives way to them where they come from other concepts, since its late stages would bring its own.

    Args:
        concepts: attribute -> placeholder. A placeholder that the prompt does not have is appended in its stages.
        stages: attribute -> stages that carry its placeholder, instead of the window's.
        num_stages: S; windows, which are tenths, are scaled to it.
        windows: attribute -> tenths; the paper's, or `model.presets`, which are measured if a file says so.

    Raises:
        ValueError: no attribute, an unknown one, a stage outside 0..S-1, or an attribute that is left without a stage.
    """
    if not concepts:
        raise ValueError(f"joint needs a concept for at least one attribute: {', '.join(PRESET_STAGES)}.")
    inside = {attribute: set(preset_stages(attribute, num_stages, windows)) for attribute in concepts}
    for attribute in ("material", "style"):
        if "content" in concepts and attribute in concepts and concepts[attribute] != concepts["content"]:
            inside["content"] -= inside[attribute]
    for attribute, chosen in (stages or {}).items():
        if attribute not in concepts:
            raise ValueError(f"stages names '{attribute}', for which there is no concept.")
        if outside := [s for s in chosen if not 0 <= s < num_stages]:
            raise ValueError(f"Stages {outside} are outside 0..{num_stages - 1}.")
        inside[attribute] = set(chosen)
    if left := [attribute for attribute in concepts if not inside[attribute] and attribute not in (stages or {})]:
        reason = "a window of ten may fall between few, and content gives way to material and style"
        remedy = f"choose its stages yourself (stages={{'{left[0]}': […]}}, or --stages)"
        raise ValueError(f"None of {num_stages} stages is left for {' and '.join(left)}: {reason}; {remedy}.")

    def text(stage: int) -> str:
        wanted = dict.fromkeys(concepts.values(), False)
        for attribute, placeholder in concepts.items():
            wanted[placeholder] |= stage in inside[attribute]
        return with_only(prompt, wanted)

    return [text(stage) for stage in range(num_stages)]


def preset_stages(attribute: str, num_stages: int, windows: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the stages of an attribute, of `num_stages`; a stage of another number is inside when its middle is."""
    if attribute not in PRESET_STAGES:
        raise ValueError(f"Unknown preset '{attribute}'; there are {', '.join(PRESET_STAGES)}.")
    return [s for s in range(num_stages) if matching_stage(s, num_stages, 10) in windows[attribute]]


def with_only(prompt: str, inside: Mapping[str, bool]) -> str:
    """Return the prompt with the placeholders that are inside their stages, and without the others."""
    pattern = placeholder_pattern(inside)
    found = set(pattern.findall(prompt))
    if not all(inside[placeholder] for placeholder in found):
        prompt = " ".join(pattern.sub(lambda match: match[0] if inside[match[0]] else " ", prompt).split())
    missing = [placeholder for placeholder, wanted in inside.items() if wanted and placeholder not in found]
    return " ".join([prompt, *missing]).strip() if missing else prompt
