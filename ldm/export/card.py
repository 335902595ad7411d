"""A model card: README.md as the Hugging Face hub reads it, for a folder of exported concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

from ldm.embeddings import Concept
from ldm.files.images import open_image

# Base models that the hub knows under another name than that of their file.
ON_THE_HUB = {
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "v1-5-pruned": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v1-5-pruned-emaonly": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "textual_inversion", "prospect"]


def model_card(
    concepts: Mapping[str, tuple[str, Concept]],
    files: Sequence[str],
    *,
    base_model: str | None = None,
    license_id: str = "creativeml-openrail-m",
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The text of README.md.

    Args:
        concepts: placeholder -> (exported name, concept).
        files: names of the files that show how the concepts are used.
        base_model: its name on the hub; None takes it from the concepts where their base model's file is known.
        license_id: as the hub calls licences.
        pictures: file name in the same folder -> what it shows.
    """
    name, first = next(iter(concepts.values()))
    pictures = pictures or {}
    base_model = base_model or ON_THE_HUB.get(Path(first.metadata.get("base_model", "")).stem)
    front = {
        **({"base_model": base_model} if base_model else {}),
        "license": license_id,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": TAGS,
        **(
            {"widget": [{"text": text, "output": {"url": file}} for file, text in pictures.items()]} if pictures else {}
        ),
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000).rstrip(),
        "---",
        f"# {name}",
        "",
        "Learned with ProSpect (Zhang et al., ACM TOG 2023): one token embedding for each stage of denoising. Stage 0 "
        "is the end of generation (fine detail), the last stage its start (layout).",
        "",
    ]
    for placeholder, (concept_name, concept) in concepts.items():
        lines.append(f"- `{concept_name}-0` … `{concept_name}-{concept.num_stages - 1}`{_origin(concept)}")
        if len(concepts) > 1:
            lines[-1] += f" Called `{placeholder}` where the pictures' prompts are quoted."
    lines += [
        "",
        "Each `.safetensors` file holds one vector and can be loaded as a textual inversion by diffusers, by "
        "AUTOMATIC1111's web UI and by ComfyUI. A picture is like the learned one only when each stage reads its own "
        "token at its own time:",
        "",
        *(f"- `{file}`: {_HOW[file.rpartition('.')[2]]}" for file in files),
    ]
    if pictures:
        lines += ["", "## Pictures", ""]
        lines += [f"![{_plain(text)}]({file})\n\n{_plain(text)}\n" for file, text in pictures.items()]
    return "\n".join(lines).rstrip() + "\n"


_HOW = {
    "py": "diffusers, with a callback that gives each timestep its prompt",
    "txt": "AUTOMATIC1111's web UI, as prompt editing for one sampler and number of steps",
    "json": "ComfyUI, a workflow with timestep ranges, for every sampler",
}


def caption(picture: Path) -> str:
    """What a sample picture shows: the prompts that it was made with, where it says so, else its name.

    Raises:
        ValueError, OSError: it is no picture, or is not there.
    """
    from ldm.files.records import PNG_KEY, read_parameters

    with open_image(picture):
        pass
    with Image.open(picture) as opened:
        if PNG_KEY not in opened.info:
            return picture.stem
    parameters = read_parameters(picture)
    words = dict.fromkeys(str(word) for word in parameters.get("prospect_words") or [] if word is not None)
    return " / ".join(words) or str(parameters.get("prompt", picture.stem))


def _origin(concept: Concept) -> str:
    """How it was learned, as far as the concept says."""
    known = concept.metadata
    parts = [f"{concept.num_stages} stages of width {concept.width}"]
    parts += [f"learned in {known['step']} steps"] if "step" in known else []
    parts += [f"from the word “{_plain(known['init_word'])}”"] if known.get("init_word") else []
    if "base_model" in known:
        fingerprint = known.get("base_model_fingerprint")
        digest = f" (fingerprint `{_plain(fingerprint)}`)" if fingerprint else ""
        parts.append(f"for the base model `{_plain(known['base_model'])}`{digest}")
    return ": " + ", ".join(parts) + "."


def _plain(text: str) -> str:
    """Text from a file that cannot become Markdown of its own."""
    return "".join(" " if c in "\r\n" else c for c in text if c not in "`[]<>|")
