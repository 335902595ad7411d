"""Concepts as the files that other programs read: the stages one by one, and how to use them there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ldm.conditioning.prompts import foreign_syntax
from ldm.embeddings import Concept, refuse_mixed_bases, remove_more_stages, save_concept, save_stages, stage_paths
from ldm.export import comfyui, diffusers_usage, webui
from ldm.export.card import Card, model_card
from ldm.export.texts import MAX_TOKENS, Escape, check_name, may_be_cut, misread, name_like, stage_words, written
from ldm.files.embedding_formats import WHOLE
from ldm.files.writing import replacing_set
from ldm.request import ModelFacts, Words, check_negative_prompt, check_placeholder

_ENDINGS = {"diffusers": "diffusers.py", "a1111": "a1111.txt", "comfyui": "comfyui.json"}
PROGRAMS = tuple(_ENDINGS)
CARD = "README.md"
_HEADER = """\
Put the files {files} into the folder embeddings of the web UI, and paste the last line as the prompt.
Made for {steps} steps of {sampler}{schedule}, CFG scale {scale}, seed {seed}, {width}x{height}: with another
sampler or number of steps the stages would change at wrong times. Counted {counting}.
Concepts: {concepts}
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
    scale: float | Sequence[float] = ModelFacts().scale
    seed: int = 42
    width: int = ModelFacts().width
    height: int = ModelFacts().height
    documented: bool = False
    negative_prompt: str = ""
    rescale: float = 0.0

    @property
    def one_scale(self) -> float:
        """The guidance scale, for programs that have one for all steps; of a list, the largest."""
        return self.scale if isinstance(self.scale, (int, float)) else max(self.scale)


@dataclass(frozen=True)
class Export:
    """Named concepts on their way to a folder.

    Args:
        concepts: placeholder -> (name in the other program, concept).
        any_base: accept concepts that were learned for different base models.

    Raises:
        ValueError: no concept, a placeholder or a name that cannot be used or is given twice, words that do not fit,
            a text that would be read as a learned token, or concepts of different base models.
    """

    concepts: Mapping[str, tuple[str, Concept]]
    use: Use = field(default_factory=Use)
    any_base: bool = False

    def __post_init__(self) -> None:
        for placeholder in self.concepts:
            check_placeholder(placeholder)
        names = [check_name(name) for name, _ in self.concepts.values()]
        if not names:
            raise ValueError("There is no concept to export; name one or more embedding files.")
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"The names {', '.join(names)} are not all different; give every concept its own.")
        if not self.any_base:
            refuse_mixed_bases(self.named)
        check_negative_prompt(self.use.negative_prompt, self.concepts)
        webui.call_timesteps(self.use.sampler, self.use.steps)  # which checks their number
        tokens = [f"{name}-{stage}" for name, of in self.named.items() for stage in range(of.num_stages)]
        if found := next(filter(None, (misread(words, tokens) for words in self._all_words)), None):
            remedy = "give the concept another --name, or change the prompt"
            raise ValueError(f"Other programs would read '{found}' in the prompt as a learned token; {remedy}.")

    @property
    def named(self) -> dict[str, Concept]:
        """The concepts by their names in the other program."""
        return dict(self.concepts.values())

    @property
    def name(self) -> str:
        """The first concept's, which the files of a program begin with."""
        return next(iter(self.named))

    @property
    def num_stages(self) -> int:
        """As many as there are words; without words, as many as the concept has that has most."""
        return len(self.use.words) if self.use.words else most_stages(self.named.values())

    @property
    def num_layers(self) -> int:
        """U-Net layers that are told apart; 1 for none.

        Raises:
            ValueError: the concepts are for U-Nets of different layers.
        """
        counts = {concept.table.shape[1] for concept in self.named.values()} - {1}
        if len(counts) > 1:
            raise ValueError("The concepts are for U-Nets with other layers; export those of one base model.")
        return next(iter(counts), 1)

    @property
    def identities(self) -> dict[str, str]:
        """Name -> identity of the concept, which every file of the export says."""
        return {name: concept.identity for name, concept in self.named.items()}

    def stage_paths(self, folder: Path) -> list[Path]:
        """The files of the stages, concept after concept."""
        return [path for name, concept in self.named.items() for path in stage_paths(concept, folder, name)]

    def paths(self, programs: Sequence[str], folder: Path, card: Card | None = None) -> list[Path]:
        """What `write` will write: the stages' files, one for each program, the card's images, the card."""
        others = [f"{self.name}_{_ENDINGS[program]}" for program in programs]
        if card is not None:
            others += [*(image.name for image in _copied(card, folder)), CARD]
        return self.stage_paths(folder) + [folder / name for name in others]

    def write(self, programs: Sequence[str], folder: Path, card: Card | None = None) -> list[str]:
        """Write the stage files, one file for each of `programs`, and the card, all of them or none.

        Returns:
            Warnings, each a sentence.

        Raises:
            ValueError: a program cannot read these concepts, or make that many steps; nothing is written.
            WriteError: no room or no right; the folder is as it was.
        """
        self._check(programs)
        texts: dict[str, str] = {}
        warnings = self._letters()
        for program in programs:
            make = {"diffusers": self._diffusers, "a1111": self._a1111, "comfyui": self._comfyui}[program]
            texts[f"{self.name}_{_ENDINGS[program]}"], inexact = make()
            warnings += inexact
        if card is not None:
            texts[CARD] = model_card(self.concepts, list(texts), card)
        with replacing_set(folder) as staging:
            for name, concept in self.named.items():
                save_stages(concept, staging, name)
            for file, text in texts.items():
                (staging / file).write_text(text, encoding="utf-8")
            for image in _copied(card, folder):
                shutil.copyfile(image, staging / image.name)
        for name, concept in self.named.items():
            remove_more_stages(folder, name, 0 if concept.is_layered else concept.num_stages)
        return list(dict.fromkeys(warnings))

    def _check(self, programs: Sequence[str]) -> None:
        """Raise `ValueError` for what one of the programs cannot do."""
        if self.num_layers > 1 and (others := [program for program in programs if program != "diffusers"]):
            raise ValueError(
                f"A vector for each U-Net layer has no form in {' and '.join(others)}; use --to diffusers, or kohya."
            )
        if "diffusers" in programs and self.use.steps == webui.TIMESTEPS:
            raise ValueError(f"diffusers' DDIM makes at most {webui.TIMESTEPS - 1} steps; give fewer with --steps.")
        several = [name for name, concept in self.named.items() if concept.table.shape[2] > 1]
        if "diffusers" in programs and any(name != name.lower() for name in several):  # as its tokenizer makes them
            raise ValueError(f"diffusers reads one token of {' and '.join(several)}; use small letters in --name.")

    @cached_property
    def _lines(self) -> list[list[str]]:
        """The words of each stage."""
        names = {placeholder: name for placeholder, (name, _) in self.concepts.items()}
        rows = {placeholder: concept.rows_for(self.num_stages) for placeholder, (_, concept) in self.concepts.items()}
        return stage_words(self.use.prompt, self.use.words, self.num_stages, names, rows)

    @property
    def _all_words(self) -> list[list[str]]:
        """The words of each stage, and of the negative prompt."""
        return [*self._lines, self.use.negative_prompt.split()]

    def _texts(self, escape: Escape = str, spell: Escape = str) -> list[str]:
        return [written(words, escape, spell) for words in self._lines]

    def _layer_texts(self) -> list[list[str]]:
        """The texts of each stage, one for each U-Net layer: the learned token of layer 3 is `name-k-l03`."""
        layered = {name for name, concept in self.named.items() if concept.is_layered}

        def of_layer(token: str, layer: int) -> str:
            return f"{token}-l{layer:02}" if token.rpartition("-")[0] in layered else token

        texts = [self._texts(spell=partial(of_layer, layer=layer)) for layer in range(self.num_layers)]
        return [list(stage) for stage in zip(*texts, strict=True)]

    def _concepts(self) -> str:
        return ", ".join(f"{name} {identity}" for name, identity in self.identities.items())

    def _letters(self) -> list[str]:
        """A warning of weights and the like, which are exported as what they are here."""
        texts = (self.use.prompt, self.use.negative_prompt, *(self.use.words or ()))
        found = next(filter(None, (foreign_syntax(text) for text in texts if isinstance(text, str))), None)
        return [f"'{found}' is read as letters here, and is exported so that other programs do, too."] if found else []

    def _differences(self, program: str) -> list[str]:
        """Warnings of what the web UI and ComfyUI do with a long prompt, with samplers and with guidance."""
        use, warnings = self.use, []
        most = max(concept.table.shape[2] for concept in self.named.values())
        if any(may_be_cut(words, most) for words in self._all_words):
            warnings.append(
                f"The prompt may be longer than {MAX_TOKENS} tokens; what follows is cut off here and in diffusers, "
                "while AUTOMATIC1111's web UI and ComfyUI read it in further chunks."
            )
        warnings += comfyui.misread(self._all_words) if program == "the workflow for ComfyUI" else []
        warnings += webui.other_images(self._texts(), use.sampler, use.steps)
        if isinstance(use.scale, Sequence) and len(set(use.scale)) > 1:
            warnings.append(f"In {program} guidance is the same in all stages, {use.one_scale:g}.")
        return warnings + ([f"In {program} guidance is not rescaled."] if use.rescale else [])

    def _diffusers(self) -> tuple[str, list[str]]:
        """The script, and what is not exact."""
        use, name = self.use, webui.split_name(self.use.sampler)
        own = next((own for own, theirs in webui.TRAILING.items() if webui.split_name(theirs) == name), None)
        values = {
            "NAME": repr(self.name),
            "CONCEPTS: dict[str, str]": repr(self.identities),
            "FILES: list[str]": _listing(path.name for path in self.stage_paths(Path())),
            "LAYERS": repr(self.num_layers),
            "PROMPTS: list[str] | list[list[str]]": _listing(
                self._texts() if self.num_layers == 1 else self._layer_texts()
            ),
            "NEGATIVE": repr(use.negative_prompt),
            "STEPS, SEED": f"{use.steps!r}, {use.seed!r}",
            "GUIDANCE: float | list[float]": repr(list(use.scale) if isinstance(use.scale, Sequence) else use.scale),
            "RESCALE": repr(use.rescale),
            "SAMPLER, SPACING": f"{own or 'ddim'!r}, {'trailing' if own else 'leading'!r}",
            "HEIGHT, WIDTH": f"{use.height!r}, {use.width!r}",
        }
        lines = Path(diffusers_usage.__file__).read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines):
            if (constant := line.partition(" = ")[0]) in values:
                lines[number] = f"{constant} = {values[constant]}"
        other_steps = (
            f"With {use.steps} steps diffusers' DDIM takes other timesteps, and makes a slightly other image; "
            f"use a number of steps that divides {webui.TIMESTEPS}."
        )
        return "\n".join(lines), [other_steps] if webui.TIMESTEPS % use.steps and own in (None, "ddim") else []

    def _a1111(self) -> tuple[str, list[str]]:
        """The prompt with what belongs to it, and what is not exact."""
        use = self.use
        prompt, warnings = webui.prompt_editing(self._texts(webui.escape), use.sampler, use.steps, use.documented)
        warnings += self._differences("the web UI")
        schedule, negative = webui.schedule_type(use.sampler), written(use.negative_prompt.split(), webui.escape)
        header = _HEADER.format(
            files=" … ".join(self.stage_paths(Path())[end].name for end in (0, -1)),
            schedule=f" (schedule type: {schedule}, not Automatic)" if schedule else "",
            counting="as documented" if use.documented else "as the program does, from step 0",
            concepts=self._concepts(),
            scale=use.one_scale,
            **{name: getattr(use, name) for name in ("steps", "sampler", "seed", "width", "height")},
        )
        notes = [f"Not exact: {warning}\n" for warning in warnings]
        notes += [f"Negative prompt: {negative}\n"] if negative else []
        return f"{header}{''.join(notes)}\n{prompt}\n", warnings

    def _comfyui(self) -> tuple[str, list[str]]:
        """The workflow, and what is not exact."""
        use = self.use
        warnings = self._differences("the workflow for ComfyUI")
        if webui.split_name(use.sampler)[0] not in comfyui.SAMPLERS:
            warnings.append(
                f"'{use.sampler}' becomes ddim in the workflow for ComfyUI; its stages are right for any sampler."
            )
        bases = (concept.metadata.get("base_model") for concept in self.named.values())
        checkpoint = next(filter(None, bases), "sd-v1-4.ckpt")
        texts = self._texts(comfyui.escape, comfyui.spell)
        negative = written(use.negative_prompt.split(), comfyui.escape)
        sampler = comfyui.sampling(use.sampler, use.steps, use.one_scale, use.seed)
        nodes = comfyui.workflow(texts, checkpoint, sampler, use.width, use.height, self.name, negative)
        nodes[max(nodes, key=int)]["_meta"] = {"title": f"Save Image: {self._concepts()}"}
        return json.dumps(nodes, indent=2) + "\n", warnings


def _copied(card: Card | None, folder: Path) -> list[Path]:
    """The card's images that are not in the folder already."""
    images = card.images if card is not None else ()
    return [image for image in images if image.resolve() != (folder / image.name).resolve()]


def _listing(entries: Iterable[object]) -> str:
    """A list as Python code, an entry in a line."""
    return "[\n" + "".join(f"    {entry!r},\n" for entry in entries) + "]"


def write_repository(concept: Concept, name: str, folder: Path, card: Card) -> list[Path]:
    """Write a repository of the hub, called `name`: the whole concept, its stages for other programs, and a card.

    Returns:
        The files in the folder.

    Raises:
        ValueError: the card cannot be written.
        WriteError: no room or no right.
    """
    token = name_like(name)
    placeholder = concept.metadata.get("placeholder", "*")
    uses = [WHOLE]
    with replacing_set(folder) as staging:
        if concept.has_table:
            Export({"*": (token, concept)}).write(["diffusers"], staging)
            uses.append(f"{token}_{_ENDINGS['diffusers']}")
        save_concept(concept, staging / WHOLE, placeholder)
        (staging / CARD).write_text(model_card({placeholder: (token, concept)}, uses, card), encoding="utf-8")
        for image in card.images:
            shutil.copyfile(image, staging / image.name)
    return sorted(path for path in folder.rglob("*") if path.is_file())
