"""A model card: README.md as the Hugging Face hub reads it, for a folder of exported concepts.

Everything that a file says of itself (metadata of concepts, prompts of images) is a stranger's text: it stands here
without control characters, on one line of limited length, and without a meaning in Markdown or HTML.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from ldm.embeddings import Concept
from ldm.files.base_model import FINGERPRINT
from ldm.files.images import image_info, open_image
from ldm.files.records import PNG_KEY, read_parameters

# Base models that the hub knows under another name than that of their file.
ON_THE_HUB = {
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "v1-5-pruned": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v1-5-pruned-emaonly": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "textual_inversion", "prospect"]
MAX_LENGTH = 120  # characters of a text that a file gives
_MEANING = re.compile(r"([\\`*_\[\]()|~$@]|(?<=:)/(?=/)|(?<=www)\.)")  # in Markdown, within a line
_HOW = {
    "py": "diffusers, with a callback that gives each timestep its prompt",
    "txt": "AUTOMATIC1111's web UI, as prompt editing for one sampler and number of steps",
    "safetensors": "this program, the whole concept: `prospect generate --concept hf:user/name`",
    "json": "ComfyUI, a workflow with timestep ranges, for every sampler",
}
_TEMPLATE = """\
---
{front}
---
# {title}

{method}

{concepts}

{how}:

{uses}
{images}"""
_STAGES = """\
Learned with ProSpect (Zhang et al., ACM TOG 2023): one token embedding for each stage of denoising. Stage 0 is the
end of sampling (fine detail), the last stage its start (layout)."""
_STAGE_FILES = """\
Each `.safetensors` file of a stage can be loaded as a textual inversion by diffusers, by AUTOMATIC1111's web UI and by
ComfyUI. An image is like the learned one only when each stage reads its own token at
its own time"""


@dataclass(frozen=True)
class Card:
    """What a card says beside what the concepts know.

    Args:
        license_id: as the hub calls licences.
        base_model: its name on the hub; None takes it from the concepts where their base model's file is known.
        images: samples, which are copied beside the card and shown in it.

    Raises:
        ValueError: two images of one name.
    """

    license_id: str = "creativeml-openrail-m"
    base_model: str | None = None
    images: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if len({image.name.lower() for image in self.images}) < len(self.images):
            raise ValueError("Two images for the card have the same name; rename one of them.")


def model_card(concepts: Mapping[str, tuple[str, Concept]], uses: Sequence[str], card: Card) -> str:
    """The text of README.md.

    Args:
        concepts: placeholder -> (exported name, concept).
        uses: names of the files that show how the concepts are used.

    Raises:
        ValueError: a sample is no image, or is not there.
    """
    captions = {image: caption(image) for image in card.images}
    title, first = next(iter(concepts.values()))
    base_model = card.base_model or ON_THE_HUB.get(Path(first.metadata.get("base_model", "")).stem)
    data = ModelCardData(
        base_model=base_model,
        license=card.license_id,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        base_model_relation="adapter" if base_model else None,
        instance_prompt=", ".join(token for placeholder, of in concepts.items() for token in _tokens(placeholder, *of)),
        widget=[{"text": text, "output": {"url": _url(image)}} for image, text in captions.items()] or None,
    )
    described = []
    for placeholder, (name, concept) in concepts.items():
        called = f" Called {escaped(placeholder)} where the images' prompts are quoted." if len(concepts) > 1 else ""
        described.append(_described(name, concept) + called)
    has_stages = all(_in_stage_files(concept) for _, concept in concepts.values())
    content = _TEMPLATE.format(
        method=_STAGES if has_stages else f"Learned with the method {escaped(first.method)}.",
        how=_STAGE_FILES if has_stages else "To be used with",
        front=data.to_yaml(),
        title=title,
        concepts="\n".join(described),
        uses="\n".join(f"- `{file}`: {_HOW[file.rpartition('.')[2]]}" for file in uses),
        images=_shown(captions),
    )
    return str(ModelCard(content.rstrip() + "\n", ignore_metadata_errors=False))


def _tokens(placeholder: str, name: str, concept: Concept) -> list[str]:
    """The words of prompts that stand for a concept: of its stage files, or the placeholder of the whole."""
    return [f"{name}-{k}" for k in range(concept.num_stages)] if _in_stage_files(concept) else [one_line(placeholder)]


def _in_stage_files(concept: Concept) -> bool:
    return concept.has_table and not concept.is_layered


def _described(name: str, concept: Concept) -> str:
    """A concept's tokens, and how it was learned as far as it says."""
    known = {key: escaped(value) for key, value in concept.metadata.items()}
    parts = [f"{concept}, identity {concept.identity}"]
    parts += [f"learned in {known['step']} steps"] if known.get("step") else []
    parts += [f"from the word “{known['init_word']}”"] if known.get("init_word") else []
    if "base_model" in known:
        digits = f" (fingerprint {known[FINGERPRINT]})" if FINGERPRINT in known else ""
        parts.append(f"for the base model {known['base_model']}{digits}")
    files = f"`{name}-0` … `{name}-{concept.num_stages - 1}`" if _in_stage_files(concept) else f"`{name}`"
    return f"- {files}: {', '.join(parts)}."


def _shown(captions: Mapping[Path, str]) -> str:
    """The images with their captions, and the hashes that say which ones belong to this card."""
    if not captions:
        return ""
    shown = [f"![{escaped(text)}]({_url(image)})\n\n*{escaped(text)}*\n" for image, text in captions.items()]
    hashes = [f"{_url(image)} {hashlib.sha256(image.read_bytes()).hexdigest()[:16]}" for image in captions]
    return "\n".join(["", "## Images", "", *shown, f"<!-- SHA-256: {', '.join(hashes)} -->"])


def caption(image: Path) -> str:
    """What a sample shows: the prompts that it was made with, where it says so, else its name."""
    open_image(image)  # which refuses what is no whole image
    if PNG_KEY not in image_info(image):
        return one_line(image.stem)
    parameters = read_parameters(image)
    words = parameters.get("prospect_words")
    texts = dict.fromkeys(str(word) for word in words if word is not None) if isinstance(words, list) else ()
    return one_line(" / ".join(texts) or str(parameters.get("prompt", image.stem)))


def one_line(text: str) -> str:
    """Text without control characters, on one line of at most `MAX_LENGTH` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_LENGTH else line[: MAX_LENGTH - 1] + "…"


def escaped(text: str) -> str:
    """One line that means nothing in Markdown or HTML where it does not begin a line; addresses become no links."""
    return _MEANING.sub(r"\\\1", html.escape(one_line(text), quote=False))


def _url(image: Path) -> str:
    """The name of a file in the same folder, as Markdown and the hub take it."""
    return quote(os.fsencode(image.name))
