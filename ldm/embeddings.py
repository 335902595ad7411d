"""Concepts: what was learned from a few images, as one file, as a file for each stage, or mixed from two.

Shapes: S stages, D width of the text transformer, n vectors of another program's embedding.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.conditioning.stages import matching_stage
from ldm.files.base_model import describe_base, same_base
from ldm.files.embedding_formats import (
    LAYERS_FILE,
    FlatPrefix,
    PickledBlock,
    PickledMapper,
    concept_file,
    in_order,
    placeholder_beside,
    read_embeddings,
    series,
)
from ldm.files.hub import fetch, is_hub
from ldm.files.tensors import TensorFileError, naming, read_file
from ldm.files.writing import check_new_file, replacing_set
from ldm.methods import catversion, find_method, neti
from ldm.methods.prospect import generate_vectors
from ldm.methods.table import TABLE, VECTORS, Table
from ldm.request import check_placeholder

EmbeddingError = TensorFileError
_VERSION_KEY, _VERSION = "prospect.version", "1"
_METHOD = "prospect.method"  # omitted in files of stage vectors
_STAGES = "prospect.num_stages"
# In a file of one stage: its number, how many there are, and the concept's identity.
_STAGE, _OF, _CONCEPT = "prospect.stage", "prospect.stage_files", "prospect.concept"

Source = str | Path | Sequence[str | Path]


class Concept:
    """The tensors that one method learned from a few images.

    Args:
        tensors: by name, finite; floating ones are kept as float32 copies without gradient. A single tensor (S, D)
            is ProSpect's: one vector for each stage of denoising, row 0 for low noise, the end of generation; with
            S = 1 it is a Textual Inversion.
        metadata: free text for the file, such as init_word, base_model, base_model_fingerprint and step.
        method: a name in `ldm.methods.METHODS`, which checks the tensors; omitted for a single tensor.

    Raises:
        EmbeddingError: an unknown method, or tensors that are not what the method learns.
    """

    def __init__(
        self,
        tensors: Tensor | Mapping[str, Tensor],
        metadata: Mapping[str, object] | None = None,
        method: str = "",
    ) -> None:
        if isinstance(tensors, Tensor):
            method = method or ("textual-inversion" if tensors.shape[:1] == (1,) else "prospect")
            tensors = {VECTORS: tensors}
        try:
            find_method(method).check(tensors)
        except ValueError as error:
            raise EmbeddingError(str(error)) from error
        self.method = method
        self.tensors = {name: _own(tensor) for name, tensor in tensors.items()}
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.source = ""  # the file or folder that it was read from

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in sorted(self.tensors.items())[:3])
        more = f", … ({len(self.tensors)} tensors)" if len(self.tensors) > 3 else ""
        known = [f"{key}={value!r:.60}" for key in ("init_word", "base_model") if (value := self.metadata.get(key))]
        return f"Concept({', '.join([repr(self.method), shapes + more, *known, *filter(None, [self.source])])})"

    @property
    def vectors(self) -> Tensor:
        """(S, D): one vector for each stage.

        Raises:
            EmbeddingError: the method does not learn stage vectors.
        """
        if VECTORS not in self.tensors:
            raise EmbeddingError(f"a concept of the method '{self.method}' has no stage vectors; use one that has.")
        return self.tensors[VECTORS]

    @property
    def table(self) -> Tensor:
        """(S, layers, n, D): n consecutive vectors for each stage and each U-Net layer; layers is 1 for all alike.

        Raises:
            EmbeddingError: the method does not learn vectors.
        """
        return self.tensors[TABLE] if self.method in ("xti", TABLE) else self.vectors[:, None, None]

    @property
    def is_layered(self) -> bool:
        """Whether U-Net layers have vectors of their own; raises `EmbeddingError` as `table` does."""
        return self.table.shape[1] > 1

    @property
    def has_table(self) -> bool:
        """Whether vectors are all that was learned."""
        return self.method in ("prospect", "textual-inversion", "xti", TABLE)

    def __str__(self) -> str:
        if self.has_table:
            stages, layers, tokens, width = self.table.shape
            more = [f"{layers} layers"] * (layers > 1) + [f"{tokens} tokens"] * (tokens > 1)
            return f"{', '.join([f'{stages} stages', *more])} of width {width}"
        return f"{self.method}, {', '.join(f'{name} {tuple(x.shape)}' for name, x in list(self.tensors.items())[:2])}"

    @property
    def num_stages(self) -> int:
        return self.table.shape[0]

    @property
    def width(self) -> int:
        return self.table.shape[-1]

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that tell concepts apart: the beginning of the SHA-256 of what was learned."""
        digest = hashlib.sha256(self.method.encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows_for(self, num_stages: int) -> list[int]:
        """Return the row that each of `num_stages` stages reads: the one at the middle of that stage's timesteps."""
        return [matching_stage(s, num_stages, self.num_stages) for s in range(num_stages)]

    def lerp(self, other: Concept, weight: float | Sequence[float], any_base: bool = False) -> Concept:
        """Return a concept between this one (weight 0) and another (weight 1), stage by stage.

        Directions are interpolated linearly and brought to the interpolated length, because a shorter vector is a
        weaker one: between two unlike vectors the plain mean is. Concepts of different S are read by time, and
        the result has as many stages as the longer one. With a weight of 0 or 1 for each stage, their rows are joined.

        Args:
            weight: one number, or one for each stage.

        Raises:
            EmbeddingError: different sizes, weights that do not fit or lie outside 0..1, or different base models
                without `any_base`.
        """
        stages = max(self.num_stages, other.num_stages)
        weights = list(weight) if isinstance(weight, Sequence) else [weight] * stages
        if len(weights) != stages or not all(0 <= number <= 1 for number in weights):
            raise EmbeddingError(f"the weight of the second must be in 0..1, or {stages} such numbers, not {weight}.")
        if self.table.shape[1:] != other.table.shape[1:]:
            one, two = (f"{concept} (base model {describe_base(concept.metadata)})" for concept in (self, other))
            raise EmbeddingError(f"concepts of {one} and of {two} cannot be mixed; use two of one method and model.")
        if not any_base:
            refuse_mixed_bases({"the first": self, "the second": other})
        first, second = (concept.table[concept.rows_for(stages)] for concept in (self, other))
        w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1, 1)
        w, rest = w.float(), (1 - w).float()
        mixed = rest * first + w * second
        length = rest * first.norm(dim=-1, keepdim=True) + w * second.norm(dim=-1, keepdim=True)
        mixed = mixed * (length / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        shared = self.metadata.items() & other.metadata.items()  # what does not differ, such as the base model
        return _of_table(mixed, dict(sorted(shared)))


def _of_table(values: Tensor, metadata: Mapping[str, str]) -> Concept:
    """The concept of vectors (S, layers, n, D), by the method that learns such a table."""
    table = Table(values)
    others = {key: text for key, text in metadata.items() if key != _METHOD}
    return Concept(table.to_concept()[0], others, table.method)


def _own(tensor: Tensor) -> Tensor:
    """Return a contiguous copy without gradient, float32 if it is floating."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    own = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if own.is_floating_point() and not torch.isfinite(own).all():
        raise EmbeddingError("the embedding has infinite or NaN values; learn it again, slower.")
    return own


def refuse_mixed_bases(concepts: Mapping[str, Concept]) -> None:
    """Raise `EmbeddingError` if two of the named concepts are known to be of different base models."""
    for (first, one), (second, other) in combinations(concepts.items(), 2):
        if same_base(one.metadata, other.metadata) is False:
            both = f"{first} for {describe_base(one.metadata)}, {second} for {describe_base(other.metadata)}"
            remedy = "use concepts of one, or any_base=True (--any_base) for relatives"
            raise EmbeddingError(f"the concepts were learned for different base models: {both}; {remedy}.")


def save_concept(concept: Concept, path: str | Path, placeholder: str = "*") -> None:
    """Write a concept as safetensors; readers see the old file or the whole new one.

    Stage vectors are the tensor {placeholder: (S, D)}, those of other methods have their own names. The concept's
    metadata goes along, but does not replace what describes the format.
    """
    metadata = _describe(concept) | {"placeholder": placeholder}
    tensors = {placeholder: concept.vectors} if VECTORS in concept.tensors else concept.tensors
    save_state_dict({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata)


def refuse_other_width(concept: Concept, placeholder: str, width: int, base_model: str) -> None:
    """Raise `ValueError` for a concept that a text transformer of another width learned.

    Args:
        width: D of the model that is to read it.
        base_model: its name.
    """
    if VECTORS in concept.tensors and concept.width != width:
        source = f" ({concept.source})" if concept.source else ""
        theirs = concept.metadata.get("base_model", "unknown")
        raise ValueError(
            f"The embedding for '{placeholder}'{source} has width {concept.width} (base model: {theirs}), but this "
            f"model's text encoder has width {width} (base model: {base_model}): it was learned for another base model."
        )


def save_new_concept(
    concept: Concept,
    path: str | Path,
    placeholder: str = "*",
    force: bool = False,
    inputs: Sequence[str | Path] = (),
) -> None:
    """`save_concept` for a path that a user gave; see `check_new_file` for what is refused.

    Raises:
        ValueError: the file or the placeholder cannot be used.
    """
    path = check_new_file(path, force, inputs)
    check_placeholder(placeholder)
    save_concept(concept, path, placeholder)


def save_stages(concept: Concept, folder: str | Path, name: str) -> list[Path]:
    """Write `name-0.safetensors`, …: a file {name-k: (D,) or (n, D)} for each stage, as other programs read embeddings.

    Vectors for each U-Net layer, which these cannot read, become one file `name-layers.safetensors`. All carry the
    concept's metadata, so that `load_concept` gives back the concept that it was, and its identity, so that files of
    two concepts are never taken for one.

    Raises:
        WriteError: no room or no right; the folder is as it was.
    """
    shared = {"placeholder": "*"} | _describe(concept) | {_OF: str(concept.num_stages), _CONCEPT: concept.identity}
    with replacing_set(Path(folder).expanduser()) as staging:
        paths = stage_paths(concept, staging, name)
        if concept.is_layered:
            save_state_dict({TABLE: concept.table.cpu()}, paths[0], shared)
        else:
            for stage, (path, vectors) in enumerate(zip(paths, concept.table[:, 0].cpu(), strict=True)):
                save_state_dict({path.stem: vectors.squeeze(0)}, path, shared | {_STAGE: str(stage)})
    return stage_paths(concept, folder, name)


def stage_paths(concept: Concept, folder: str | Path, name: str) -> list[Path]:
    """Return where `save_stages` writes."""
    if concept.is_layered:
        return [Path(folder).expanduser() / f"{name}{LAYERS_FILE}"]
    return [Path(folder).expanduser() / f"{name}-{stage}.safetensors" for stage in range(concept.num_stages)]


def remove_more_stages(folder: str | Path, name: str, count: int) -> None:
    """Delete files of stages `count`, … that `save_stages` wrote for a concept of that name with more of them."""
    for path in Path(folder).glob(f"{glob.escape(name)}-*.safetensors"):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdecimal() and int(number) >= count and _CONCEPT in read_file(path).metadata:
            path.unlink()


def _describe(concept: Concept) -> dict[str, str]:
    of_method = {_METHOD: concept.method}
    if VECTORS in concept.tensors:
        of_method = {
            _STAGES: str(concept.num_stages),
            "prospect.num_timesteps": "1000",
            "prospect.order": "0 = low noise (end of generation), S-1 = high noise (start)",
        }
    return concept.metadata | {"format": "pt", _VERSION_KEY: _VERSION} | of_method


def load_concept(source: Source, key: str | None = None, rows_are_stages: bool = False) -> Concept:
    """Read a concept of any known kind, told apart by its content; no code of a file is run.

    * this program's, of every method in `ldm.methods.METHODS`;
    * the reference's `.pt`, a pickled generator block: evaluated without dropout. (The reference samples with
      its dropout on when the file was saved during training.)
    * NeTI's `mapper-*.pt`, alone or listed with its `learned_embeds-*.bin`;
    * Textual Inversion of one vector, S = 1, or of n for consecutive tokens: diffusers (`.safetensors`, `.bin`), A1111
      and rinongal (`.pt`), and A1111's images with an embedding in them;
    * CatVersion's `pytorch_adapter.bin`, or the folder with it;
    * a folder as the hub has them: sd-concepts-library's, with `learned_embeds.bin` and `token_identifier.txt`, or of
      `prospect push`; and `hf:user/name[@revision]`, of which only safetensors, JSON and YAML are fetched;
    * P+ of kohya's scripts, n vectors for each U-Net layer;
    * S files of one vector each (`name-0.safetensors`, …): a list of them, their folder, or any one of those
      that this program wrote.

    Args:
        source: a file, a folder, or a list of files. Files that are numbered are read by their numbers, others in
            the order of the list, the END of generation first.
        key: the name of the embedding in a file of several, or of the files in a folder of several; where there
            is one, that one is read, whatever its name.
        rows_are_stages: take the n vectors of a file without metadata for n stages, the END of generation first, and
            not for n consecutive tokens, as other programs do.

    Raises:
        EmbeddingError: a file is missing, damaged or of another kind, names code, holds several embeddings, is for
            Stable Diffusion XL or of an unknown method; stages are missing, or do not belong together.
    """
    if is_hub(source):
        folder, place = fetch(str(source))
        concept = _read_path(folder, key, rows_are_stages)
    elif isinstance(source, (str, Path)):
        concept = _read_path(path := Path(source).expanduser(), key, rows_are_stages)
        place = str(path)
    else:
        paths = [Path(path).expanduser() for path in source]
        if not paths:
            raise EmbeddingError("the list of stage files is empty; give one file for each stage.")
        concept, place = _read_list(paths), str(paths[0].parent)
    concept.source = place
    return concept


def _read_list(paths: Sequence[Path]) -> Concept:
    """Return the concept in its stage files, or in NeTI's two files: the mapper, and the word that names it."""
    words = [path for path in paths if path.name.startswith("learned_embeds-")]
    if len(paths) != 2 or len(words) != 1:
        return _join(paths[0].parent, in_order(paths))
    concept = _read(next(path for path in paths if path not in words))
    names, own = read_embeddings(words[0])[0], concept.metadata.get("placeholder")
    with naming(words[0]):
        if concept.method != "neti" or own not in names:
            raise EmbeddingError(f"it names {', '.join(map(str, names))}, but the mapper was learned as {own}.")
    return concept


def _read_path(path: Path, key: str | None, rows_are_stages: bool) -> Concept:
    path = concept_file(path)
    if path.is_dir():
        return _join(path, series(path, key))
    concept = _read(path, key, rows_are_stages)
    return _join(path.parent, series(path)) if _STAGE in concept.metadata else concept


def _read(path: Path, key: str | None = None, rows_are_stages: bool = False) -> Concept:
    """Return the concept in one file, which may be one stage of a whole."""
    content, metadata = read_embeddings(path)
    with naming(path):
        if metadata.get(_VERSION_KEY, _VERSION) != _VERSION:
            version = metadata[_VERSION_KEY]
            raise EmbeddingError(f"the file has format version {version}, not {_VERSION}; update this program.")
        if isinstance(content, PickledBlock):
            vectors = generate_vectors(*content)
            return Concept(vectors, {_STAGES: str(len(vectors))})
        if isinstance(content, PickledMapper):
            return Concept(*neti.from_reference(*content), "neti")
        if isinstance(content, FlatPrefix):
            return Concept(*catversion.from_adapter(content.values), "catversion")
        method = metadata.get(_METHOD, "prospect")
        if method not in ("prospect", "textual-inversion") and _STAGE not in metadata:
            concept = Concept(content, metadata, method)
            find_method(method).load(concept.tensors, metadata)  # refuses what does not fit
            return concept
        vectors = content[_choose(list(content), key)]
        vectors = vectors.unsqueeze(0) if vectors.ndim == 1 else vectors
        metadata = placeholder_beside(path, list(content)) | metadata
        concept = Concept(vectors, metadata)
        stages = str(concept.num_stages)
        if _STAGE not in metadata and metadata.get(_STAGES, stages) != stages:
            raise EmbeddingError(f"there are {stages} vectors for {metadata[_STAGES]} stages; use another copy.")
        consecutive = _STAGE in metadata or not (_STAGES in metadata or rows_are_stages)
        return _of_table(vectors[None, None], metadata) if consecutive and len(vectors) > 1 else concept


def _choose(names: list[str], key: str | None) -> str:
    if "emp_params_out" in names and key not in names:
        raise EmbeddingError(
            "it is OneTrainer's with an output embedding (emp_params_out), which is added behind the text encoder and "
            "has no place here; train it without one, or take the rest alone (key=…, or --key emp_params)."
        )
    if {"clip_l", "clip_g"} <= set(names):
        raise EmbeddingError("it is for Stable Diffusion XL (clip_l and clip_g); use one for version 1.")
    if key in names:
        return str(key)
    if len(names) != 1:
        listing = f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""
        raise EmbeddingError(
            f"the file holds {len(names) or 'no'} embeddings{listing}; use a file with one, or of several give the "
            "name of one (key=…, or --key of scripts/import_embedding.py)."
        )
    return names[0]


def _join(folder: Path, paths: Sequence[Path]) -> Concept:
    """Return one concept from a file for each stage, the END of generation first."""
    parts = [_read(path) for path in paths]
    size, origin = parts[0].table.shape[1:], _origin(parts[0])
    for path, part in zip(paths, parts, strict=True):
        with naming(path):
            if part.num_stages != 1 or (_STAGES in part.metadata and _STAGE not in part.metadata):
                raise EmbeddingError("this holds all stages of a concept, not one of them; give it alone.")
            if part.table.shape[1:] != size or _origin(part) != origin:
                raise EmbeddingError(f"this and '{paths[0].name}' are of different concepts; give the stages of one.")
    numbers = [part.metadata.get(_STAGE) for part in parts]
    count = origin.pop(_OF, str(len(parts)))
    if numbers[0] is not None and (numbers != [str(k) for k in range(len(parts))] or count != str(len(parts))):
        here = ", ".join(map(str, numbers))
        raise EmbeddingError(f"'{folder}': of {count} stage files those of stages {here} are here; give each once.")
    origin.pop(_CONCEPT, None)
    return _of_table(torch.cat([part.table for part in parts]), origin)


def _origin(part: Concept) -> dict[str, str]:
    """Return what the files of all stages of a concept say alike."""
    return {key: value for key, value in part.metadata.items() if key != _STAGE}
