"""Concepts: the S learned vectors of a picture, as one file, as S files, or mixed from two.

Shapes: S stages, D width of the text transformer, n vectors of another program's embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.conditioning.prompts import check_placeholder
from ldm.conditioning.stages import matching_stage
from ldm.files.embedding_formats import (
    STAGES,
    EmbeddingError,
    in_order,
    is_plain,
    naming,
    read_embeddings,
    refuse_run,
    series,
    series_of,
)
from ldm.files.writing import replacing_set, writing_to

__all__ = [
    "Concept",
    "EmbeddingError",
    "load_concept",
    "save_concept",
    "save_new_concept",
    "save_stages",
    "stage_paths",
]

_VERSION = "1"
# In a file of one stage: its number, how many there are, and the concept's identity.
_STAGE, _OF, _CONCEPT = "prospect.stage", "prospect.stage_files", "prospect.concept"
_TIMESTEPS = ("prospect.num_timesteps", "1000")
_ORDER = ("prospect.order", "0 = low noise (end of generation), S-1 = high noise (start)")
_LISTED = 8

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False)
class Concept:
    """What was learned of a picture: one vector for each stage of denoising (1 stage: Textual Inversion).

    Args:
        vectors: (S, D), finite, of any floating dtype; kept as a float32 copy without gradient. Row 0 is for
            low noise, the end of generation.
        metadata: free text for the file, such as init_word, base_model, base_model_sha256 and step.

    Raises:
        EmbeddingError: the vectors are not such a matrix.
    """

    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.vectors.shape), self.vectors.dtype
        if len(shape) != 2 or 0 in shape or not dtype.is_floating_point:
            raise EmbeddingError(f"an embedding has floats of shape (stages, width), not {dtype} of {shape}.")
        vectors = self.vectors.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(vectors).all():
            raise EmbeddingError("the embedding has infinite or NaN values; learn it again, slower.")
        object.__setattr__(self, "vectors", vectors)

    @property
    def num_stages(self) -> int:
        """S."""
        return self.vectors.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.vectors.shape[1]

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that tell concepts apart: the beginning of the SHA-256 of what was learned."""
        return hashlib.sha256(self.vectors.cpu().numpy().tobytes()).hexdigest()[:16]

    def rows_for(self, num_stages: int) -> list[int]:
        """The row that each of `num_stages` stages reads: the one at the middle of that stage's timesteps."""
        return [matching_stage(s, num_stages, self.num_stages) for s in range(num_stages)]

    def lerp(self, other: Concept, weight: float) -> Concept:
        """A concept between this one (weight 0) and another (weight 1), stage by stage.

        Directions are interpolated linearly and brought to the interpolated length, because a shorter vector is a
        weaker one: between two unlike vectors the plain mean is. Concepts of different S are read by time, and
        the result has as many stages as the longer one.

        Raises:
            EmbeddingError: different widths, or a weight outside 0..1.
        """
        if not 0 <= weight <= 1:
            raise EmbeddingError(f"the weight of the second concept must be in 0..1, not {weight}.")
        if self.width != other.width:
            raise EmbeddingError(
                f"concepts of width {self.width} and {other.width} cannot be mixed: they were learned for "
                f"different base models ({_base_of(self)} and {_base_of(other)})."
            )
        stages = max(self.num_stages, other.num_stages)
        first, second = (concept.vectors[concept.rows_for(stages)] for concept in (self, other))
        mixed = (1 - weight) * first + weight * second
        length = (1 - weight) * first.norm(dim=1, keepdim=True) + weight * second.norm(dim=1, keepdim=True)
        mixed = mixed * (length / mixed.norm(dim=1, keepdim=True).clamp(min=1e-12))
        shared = self.metadata.items() & other.metadata.items()  # what does not differ, such as the base model
        return Concept(mixed, dict(sorted(shared)))


def _base_of(concept: Concept) -> str:
    return concept.metadata.get("base_model", "unknown")


def save_concept(concept: Concept, path: str | Path, placeholder: str = "*") -> None:
    """Write {placeholder: (S, D)} as safetensors; readers see the old file or the whole new one.

    The concept's metadata goes along, but does not replace what describes the format.
    """
    metadata = _describe(concept) | {"placeholder": placeholder}
    save_state_dict({placeholder: concept.vectors.cpu()}, path, metadata)


def save_new_concept(concept: Concept, path: str | Path, placeholder: str = "*", force: bool = False) -> None:
    """`save_concept` for a path that a user gave.

    Raises:
        EmbeddingError: not a .safetensors file, or there already without `force`.
        ValueError: a placeholder that cannot be used.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise EmbeddingError(f"'{path}': the file to write must end in .safetensors.")
    if path.is_dir() or (path.exists() and not force):
        raise EmbeddingError(f"'{path}' is there already; name another file, or say --force.")
    check_placeholder(placeholder)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_concept(concept, path, placeholder)


def save_stages(concept: Concept, folder: str | Path, name: str) -> list[Path]:
    """Write `name-0.safetensors`, …: a file {name-k: (D,)} for each stage, as other programs read embeddings.

    Each also carries the concept's metadata, so that `load_concept` gives back the concept that it was, and its
    identity, so that files of two concepts are never taken for one.

    Raises:
        WriteError: no room or no right; the folder is as it was.
    """
    shared = {"placeholder": "*"} | _describe(concept) | {_OF: str(concept.num_stages), _CONCEPT: concept.identity}
    with replacing_set(folder) as staging:
        for stage, path in enumerate(stage_paths(concept, staging, name)):
            save_state_dict({path.stem: concept.vectors[stage].cpu()}, path, shared | {_STAGE: str(stage)})
    return stage_paths(concept, folder, name)


def stage_paths(concept: Concept, folder: str | Path, name: str) -> list[Path]:
    """Where `save_stages` writes."""
    return [Path(folder) / f"{name}-{stage}.safetensors" for stage in range(concept.num_stages)]


def _describe(concept: Concept) -> dict[str, str]:
    return {key: str(value) for key, value in concept.metadata.items()} | {
        "format": "pt",
        "prospect.version": _VERSION,
        STAGES: str(concept.num_stages),
        **dict([_TIMESTEPS, _ORDER]),
    }


def load_concept(source: Source, key: str | None = None, rows_are_stages: bool = False) -> Concept:
    """Read an embedding of any known kind, told apart by its content; no code of a file is run.

    * this program's: (S, D) with metadata;
    * the reference's `.pt`, a pickled generator block: evaluated without dropout. (The reference samples with
      its dropout on when the file was saved during training.)
    * Textual Inversion of one vector, S = 1: diffusers (`.safetensors`, `.bin`), A1111 and rinongal (`.pt`);
    * S files of one vector each (`name-0.safetensors`, …): a list of them, their folder, or any one of those
      that this program wrote.

    Args:
        source: a file, a folder, or a list of files. Files that are numbered are read by their numbers, others in
            the order of the list, the END of generation first.
        key: the name of the embedding in a file of several, or of the files in a folder of several; where there
            is one, that one is read, whatever its name.
        rows_are_stages: take the n vectors of a file without metadata for n stages, the END of generation first;
            other programs mean n consecutive tokens by them, which is no concept.

    Raises:
        EmbeddingError: a file is missing, damaged or of another kind, names code, holds several embeddings or
            vectors for consecutive tokens, or is for Stable Diffusion XL; stages are missing, or do not belong
            together.
    """
    listed = [source] if isinstance(source, (str, Path)) else source
    if not isinstance(listed, Sequence) or not all(isinstance(path, (str, Path)) for path in listed):
        raise EmbeddingError(f"a concept is read from a file's path, or a list of such, not from {source!r}.")
    if not listed:
        raise EmbeddingError("the list of stage files is empty; give one file for each stage.")
    if listed is source:
        paths = [Path(path) for path in source]
        return _join(paths[0].parent, in_order(paths))
    path = Path(source)
    with naming(path):
        refuse_run(path)
    if path.is_dir():
        return _join(path, series(path, key))
    vectors, metadata = _read_file(path, key, rows_are_stages)
    if _STAGE in metadata:
        return _join(path.parent, series(path.parent, series_of(path)))
    with naming(path):
        return Concept(vectors, metadata)


def _read_file(path: Path, key: str | None, rows_are_stages: bool = False) -> tuple[Tensor, dict[str, str]]:
    """The vectors (n, D) of one file, and its metadata."""
    with naming(path):
        tensors, metadata = read_embeddings(path)
        vectors = tensors[_choose(list(tensors), key)]
        if not is_plain(vectors) or vectors.ndim not in (1, 2):
            found = f"{vectors.dtype} of shape {tuple(vectors.shape)}"
            raise EmbeddingError(f"this is no embedding but {found}; use a file with vectors of one width.")
        vectors = torch.atleast_2d(vectors)
        _check_stages(len(vectors), metadata, rows_are_stages)
        return vectors, metadata


def _choose(names: list[str], key: str | None) -> str:
    if {"clip_l", "clip_g"} <= set(names):
        raise EmbeddingError("it is for Stable Diffusion XL (clip_l and clip_g); use one for version 1.")
    if key in names:
        return key
    if not names:
        raise EmbeddingError("the file holds no embedding; use one that does.")
    if len(names) > 1:
        listing = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
        raise EmbeddingError(
            f"the file holds {len(names)} embeddings ({listing}); give the name of one (key=…, or --key of "
            "scripts/import_embedding.py)."
        )
    return names[0]


def _check_stages(rows: int, metadata: Mapping[str, str], rows_are_stages: bool) -> None:
    version, stages = metadata.get("prospect.version", _VERSION), metadata.get(STAGES)
    if version != _VERSION:
        raise EmbeddingError(f"the file has format version {version}, not {_VERSION}; update this program.")
    if _STAGE in metadata:
        stages = "1"
    if stages is None and rows != 1 and not rows_are_stages:
        raise EmbeddingError(
            f"its {rows} vectors are for {rows} consecutive tokens of a prompt, not for {rows} stages of "
            "denoising; use an embedding of one vector, or say that rows are stages (rows_are_stages=True, or "
            "--rows_are_stages of scripts/import_embedding.py)."
        )
    if metadata.get(_TIMESTEPS[0], _TIMESTEPS[1]) != _TIMESTEPS[1]:
        raise EmbeddingError(
            f"it was learned for {metadata[_TIMESTEPS[0]]} timesteps, not 1000; use one of this program."
        )
    if metadata.get(_ORDER[0], _ORDER[1]) != _ORDER[1]:
        raise EmbeddingError(f"its stages are in another order ({metadata[_ORDER[0]]}); use one of this program.")
    if stages is not None and stages != str(rows):
        raise EmbeddingError(f"there are {rows} vectors for {stages} stages; use another copy of the file.")


def _join(folder: Path, paths: Sequence[Path]) -> Concept:
    """One concept from a file for each stage, the END of generation first."""
    parts = [_read_file(path, None) for path in paths]
    for path, (vectors, metadata) in zip(paths, parts, strict=True):
        with naming(path):
            if len(vectors) != 1 or (STAGES in metadata and _STAGE not in metadata):
                raise EmbeddingError("this holds all stages of a concept, not one of them; give it alone.")
            if vectors.shape[1] != parts[0][0].shape[1]:
                widths = f"{vectors.shape[1]}, not {parts[0][0].shape[1]} as '{paths[0].name}'"
                raise EmbeddingError(f"its width is {widths}; give the stages of one concept.")
    origins = [{k: v for k, v in metadata.items() if k not in (_STAGE, _OF)} for _, metadata in parts]
    with naming(folder):
        if any(origin != origins[0] for origin in origins):
            raise EmbeddingError("the stage files were exported from different concepts; give those of one.")
        numbers = [metadata.get(_STAGE) for _, metadata in parts]
        count = parts[0][1].get(_OF, str(len(parts)))
        if numbers[0] is not None and (numbers != [str(k) for k in range(len(parts))] or count != str(len(parts))):
            raise EmbeddingError(
                f"of {count} stage files those of stages {', '.join(map(str, numbers))} are here; give all, each once."
            )
        metadata = {key: value for key, value in origins[0].items() if key != _CONCEPT}
        return Concept(torch.cat([vectors for vectors, _ in parts]), metadata)
