"""Concepts as the files that other programs read: the stages one by one, and how to use them there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.conditioning.prompts import Words, check_negative_prompt, check_placeholder
from ldm.embeddings import Concept, save_stages, stage_paths
from ldm.export import comfyui, diffusers_usage, webui
from ldm.export.texts import check_name, escaped, stage_texts
from ldm.files.writing import replace_text
from ldm.request import ModelFacts

_ENDINGS = {"diffusers": "diffusers.py", "a1111": "a1111.txt", "comfyui": "comfyui.json"}
PROGRAMS = tuple(_ENDINGS)
_HEADER = """\
Put the files {files} into the folder embeddings of the web UI, and paste the last line as the prompt.
Made for {steps} steps of {sampler}{schedule}, CFG scale {scale}, seed {seed}, {width}x{height}: with another
sampler or number of steps the stages would change at wrong times. Counted {counting}.
"""


def most_stages(concepts: Iterable[Concept]) -> int:
    """The stages of the concept that has most; those with fewer are read by time."""
    return max(concept.num_stages for concept in concepts)


@dataclass(frozen=True)
class Use:
    """What is generated with the concepts: the arguments of `ldm.generate.main` that other programs have, too.

    Args:
        sampler: as AUTOMATIC1111 names it; what matters there is when each stage begins.
        documented: for AUTOMATIC1111: count steps as its documentation says, and not as it does.
    """

    prompt: str = "*"
    words: Words | None = None
    sampler: str = "ddim"
    steps: int = 50
    scale: float = ModelFacts().scale
    seed: int = 42
    width: int = ModelFacts().width
    height: int = ModelFacts().height
    documented: bool = False
    negative_prompt: str = ""


@dataclass(frozen=True)
class Export:
    """Named concepts on their way to a folder.

    Args:
        concepts: placeholder -> (name in the other program, concept).

    Raises:
        ValueError: no concept, a placeholder or a name that cannot be used or is given twice, or words that do not fit.
    """

    concepts: Mapping[str, tuple[str, Concept]]
    use: Use = field(default_factory=Use)

    def __post_init__(self) -> None:
        for placeholder in self.concepts:
            check_placeholder(placeholder)
        names = [check_name(name) for name, _ in self.concepts.values()]
        if not names:
            raise ValueError("There is no concept to export; name one or more embedding files.")
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"The names {', '.join(names)} are not all different; give every concept its own.")
        check_negative_prompt(self.use.negative_prompt, self.concepts)
        webui.call_timesteps(self.use.sampler, self.use.steps)
        self._texts()

    @property
    def name(self) -> str:
        """The first concept's, which the files of a program begin with."""
        return next(iter(self.concepts.values()))[0]

    @property
    def num_stages(self) -> int:
        """As many as there are words; without words, as many as the concept has that has most."""
        return len(self.use.words) if self.use.words else most_stages(concept for _, concept in self.concepts.values())

    def stage_paths(self, folder: Path) -> list[Path]:
        """The files of the stages, concept after concept."""
        return [path for name, concept in self.concepts.values() for path in stage_paths(concept, folder, name)]

    def paths(self, programs: Sequence[str], folder: Path) -> list[Path]:
        """What `write` will write: the stages' files, then one for each program."""
        return self.stage_paths(folder) + [folder / f"{self.name}_{_ENDINGS[program]}" for program in programs]

    def write(self, programs: Sequence[str], folder: Path) -> list[str]:
        """Write the stage files, and one file for each of `programs`; returns warnings, each a sentence.

        Raises:
            ValueError: a program cannot make that many steps; nothing is written.
        """
        if "diffusers" in programs and self.use.steps == webui.TIMESTEPS:
            raise ValueError(f"diffusers' DDIM makes at most {webui.TIMESTEPS - 1} steps; give fewer with --steps.")
        folder.mkdir(parents=True, exist_ok=True)
        for name, concept in self.concepts.values():
            save_stages(concept, folder, name)
        warnings: list[str] = []
        contents = {"diffusers": self._diffusers, "a1111": self._a1111, "comfyui": self._comfyui}
        for program in programs:
            path = folder / f"{self.name}_{_ENDINGS[program]}"
            replace_text(path, contents[program](warnings))
        return warnings

    def _texts(self, spell: Callable[[str], str] = str, escape: Callable[[str], str] = str) -> list[str]:
        names = {placeholder: name for placeholder, (name, _) in self.concepts.items()}
        rows = {placeholder: concept.rows_for(self.num_stages) for placeholder, (_, concept) in self.concepts.items()}
        return stage_texts(self.use.prompt, self.use.words, self.num_stages, names, rows, spell, escape)

    def _diffusers(self, warnings: list[str]) -> str:
        use = self.use
        if webui.TIMESTEPS % use.steps:
            warnings.append(
                f"With {use.steps} steps diffusers' DDIM takes other timesteps, and makes a slightly other picture; "
                f"use a number of steps that divides {webui.TIMESTEPS}."
            )
        values = {
            "NAME": self.name,
            "FILES": [path.name for path in self.stage_paths(Path())],
            "PROMPTS": self._texts(),
            "NEGATIVE": use.negative_prompt,
            "STEPS, GUIDANCE, SEED": (use.steps, use.scale, use.seed),
            "HEIGHT, WIDTH": (use.height, use.width),
        }
        source = Path(diffusers_usage.__file__).read_text(encoding="utf-8")
        for names, value in values.items():
            rows = "".join(f"    {entry!r},\n" for entry in value) if isinstance(value, list) else ""
            text = f"[\n{rows}]" if rows else repr(value).strip("()")
            source = re.sub(
                rf"^({names}(?:: [^=]+)?) = .*$", lambda m, text=text: f"{m[1]} = {text}", source, flags=re.M
            )
        return source

    def _a1111(self, warnings: list[str]) -> str:
        use = self.use
        prompt, found = webui.prompt_editing(self._texts(escape=webui.escape), use.sampler, use.steps, use.documented)
        warnings += found
        files = " … ".join(self.stage_paths(Path())[end].name for end in (0, -1))
        settings = {name: getattr(use, name) for name in ("steps", "sampler", "scale", "seed", "width", "height")}
        notes = "".join(f"Not exact: {warning}\n" for warning in found)
        schedule = webui.schedule_type(use.sampler)
        settings["schedule"] = f" (schedule type: {schedule}, not Automatic)" if schedule else ""
        settings["counting"] = "as documented" if use.documented else "as the program does, from step 0"
        negative = escaped(use.negative_prompt, webui.escape)
        notes += f"Negative prompt: {negative}\n" if negative else ""
        return _HEADER.format(files=files, **settings) + notes + f"\n{prompt}\n"

    def _comfyui(self, warnings: list[str]) -> str:
        use = self.use
        if not comfyui.knows(use.sampler):
            warnings.append(
                f"'{use.sampler}' becomes ddim in the workflow for ComfyUI; its stages are right for any sampler."
            )
        checkpoint = next(iter(self.concepts.values()))[1].metadata.get("base_model", "sd-v1-4.ckpt")
        settings = {name: getattr(use, name) for name in ("steps", "sampler", "scale", "seed", "width", "height")}
        texts = self._texts(comfyui.spell, comfyui.escape)
        settings["negative"] = escaped(use.negative_prompt, comfyui.escape)
        return json.dumps(comfyui.workflow(texts, checkpoint, prefix=self.name, **settings), indent=2) + "\n"
