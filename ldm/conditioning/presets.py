"""Presets: which stages take an attribute from a learned picture, as lists for `prospect_words`.

The paper's windows of stages are those of Stable Diffusion v1.4. A model for which others were measured
(`scripts/spectrum.py --write-presets`) has them in a file `presets.yaml` beside its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ldm.conditioning.stages import matching_stage

PRESETS_FILE = "presets.yaml"

# Stages (of ten) in which the paper lets `*` carry an attribute of the picture; the other stages follow the class
# prompt. Zhang et al. 2023, section 5 and the authors' README; for `style` they name no stages and count it with
# material, at the high-frequency end. `layout` adds `*` to the class prompt instead of putting it inside.
PRESET_STAGES: dict[str, tuple[int, ...]] = {
    "content": (0, 1, 2, 3, 4, 5, 6, 7),
    "layout": (9,),
    "material": (0, 1, 2, 3, 4),
    "style": (0, 1, 2, 3, 4),
}


def load_presets(path: str | Path | None) -> dict[str, tuple[int, ...]]:
    """The windows of a YAML file {attribute: [stages of ten]}, for attributes it leaves out the paper's; None: those.

    Raises:
        ValueError: no such file, an unknown attribute, or something else than a list of stages 0..9.
    """
    if path is None:
        return dict(PRESET_STAGES)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"The presets '{path}' cannot be read; scripts/spectrum.py writes such files.") from error
    if not isinstance(content, dict) or not set(content) <= set(PRESET_STAGES):
        raise ValueError(f"The presets '{path}' must give lists of stages for {', '.join(PRESET_STAGES)}.")
    for attribute, stages in content.items():
        if not isinstance(stages, list) or not stages or not all(type(s) is int and 0 <= s <= 9 for s in stages):
            raise ValueError(f"The preset '{attribute}' in '{path}' must be a list of stages 0..9, not {stages}.")
    return PRESET_STAGES | {attribute: tuple(stages) for attribute, stages in content.items()}


def presets_beside(ckpt: str | Path) -> dict[str, tuple[int, ...]]:
    """The windows of `presets.yaml` beside a checkpoint (inside it, if it is a folder), or the paper's.

    Raises:
        ValueError: see `load_presets`.
    """
    folder = Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent
    return load_presets(folder / PRESETS_FILE if (folder / PRESETS_FILE).is_file() else None)


def preset(
    attribute: str,
    prompt: str,
    stages: Sequence[int] | None = None,
    num_stages: int = 10,
    placeholder: str = "*",
    windows: Mapping[str, Sequence[int]] = PRESET_STAGES,
) -> list[str]:
    """The `prospect_words` that take one attribute from the picture and the rest from the text.

    `preset('material', 'a * dog on the table')` has `*` in stages 0–4, and `a dog on the table` in 5–9. A prompt
    without the placeholder gets it appended in those stages.

    Args:
        attribute: content, layout, material or style.
        stages: stages that carry the placeholder, instead of the window's.
        num_stages: S; windows, which are tenths, are scaled to it.
        windows: attribute -> tenths; the paper's, or `model.presets`, which are measured if a file says so.

    Raises:
        ValueError: unknown attribute, a stage outside 0..S-1, or a window in which none of few stages has its middle.
    """
    if stages is None:
        stages = _window(attribute, num_stages, windows)
        if not stages:
            tenths = ", ".join(map(str, windows[attribute]))
            raise ValueError(
                f"The preset '{attribute}' is stages {tenths} of ten, and none of this concept's {num_stages} has its "
                "middle there; choose its stages yourself (stages=…, or --word for each stage)."
            )
    _check_stages(attribute, stages, num_stages)
    return [_with_only(prompt, {placeholder: stage in stages}) for stage in range(num_stages)]


def joint(
    concepts: Mapping[str, str],
    prompt: str = "",
    stages: Mapping[str, Sequence[int]] | None = None,
    num_stages: int = 10,
    windows: Mapping[str, Sequence[int]] = PRESET_STAGES,
) -> list[str]:
    """The `prospect_words` that take several attributes, each from a concept of its own, and the rest from the text.

    `joint({'content': '<a>', 'material': '<b>', 'layout': '<c>'}, 'a <b> <a> thing')` has `<c>` behind `a thing` in
    stage 9, `<a>` in its place in 5–7, `<b>` in 0–4, and `a thing` in 8. Material and style stand beside each other;
    content gives way to them where they come from other concepts, since its late stages would bring its own.

    Args:
        concepts: attribute -> placeholder. A placeholder that the prompt does not have is appended in its stages.
        stages: attribute -> stages that carry its placeholder, instead of the window's.
        num_stages, windows: as for `preset`.

    Raises:
        ValueError: no attribute, an unknown one, a stage outside 0..S-1, or an attribute that is left without a stage.
    """
    if not concepts:
        raise ValueError(f"joint needs a concept for at least one attribute: {', '.join(PRESET_STAGES)}.")
    windows = {attribute: set(_window(attribute, num_stages, windows)) for attribute in concepts}
    for attribute in ("material", "style"):
        if attribute in concepts and concepts[attribute] != concepts.get("content"):
            windows.get("content", set()).difference_update(windows[attribute])
    for attribute, chosen in (stages or {}).items():
        if attribute not in concepts:
            raise ValueError(
                f"stages names '{attribute}', for which there is no concept; there are {', '.join(concepts)}."
            )
        windows[attribute] = set(chosen)
        _check_stages(attribute, chosen, num_stages)
    if left := [attribute for attribute in concepts if not windows[attribute] and attribute not in (stages or {})]:
        raise ValueError(
            f"No stage is left for {' and '.join(left)}, since content gives way to material and style and few stages "
            f"may miss a window; give stages={{'{left[0]}': […]}}."
        )

    def text(stage: int) -> str:
        inside = dict.fromkeys(concepts.values(), False)
        for attribute, placeholder in concepts.items():
            inside[placeholder] |= stage in windows[attribute]
        return _with_only(prompt, inside)

    return [text(stage) for stage in range(num_stages)]


def _window(attribute: str, num_stages: int, windows: Mapping[str, Sequence[int]]) -> list[int]:
    """The stages of an attribute; a stage of another number is inside when its middle is."""
    if attribute not in PRESET_STAGES:
        raise ValueError(f"Unknown preset '{attribute}'; there are {', '.join(PRESET_STAGES)}.")
    return [s for s in range(num_stages) if matching_stage(s, num_stages, 10) in windows[attribute]]


def _check_stages(attribute: str, stages: Sequence[int], num_stages: int) -> None:
    if attribute not in PRESET_STAGES:
        raise ValueError(f"Unknown preset '{attribute}'; there are {', '.join(PRESET_STAGES)}.")
    outside = [s for s in stages if not 0 <= s < num_stages]
    if outside:
        raise ValueError(f"Stages {outside} are outside 0..{num_stages - 1}.")


def _with_only(prompt: str, inside: Mapping[str, bool]) -> str:
    """The prompt with the placeholders that are inside their stages, and without the others."""
    for placeholder in (p for p, wanted in inside.items() if not wanted):
        if placeholder in prompt:
            prompt = " ".join(prompt.replace(placeholder, " ").split())
    for placeholder in (p for p, wanted in inside.items() if wanted):
        if placeholder not in prompt:
            prompt = f"{prompt} {placeholder}".strip()
    return prompt
