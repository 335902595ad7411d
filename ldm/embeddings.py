"""Embedding files: the S learned vectors of a concept, written as tensors, read from every known format.

Shapes: S stages, D width of the text transformer, n vectors of another program's embedding.
"""

from __future__ import annotations

import difflib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.weight_files import reading_with

_VERSION = "1"
_STAGES = "prospect.num_stages"
_STAND_IN_FOR = ("ldm.", "torch.nn.modules.")
_LISTED = 8


class EmbeddingError(ValueError):
    """An embedding that cannot be used: one sentence: which file, what is wrong with it, what to do."""


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


def save_concept(concept: Concept, path: str | Path, placeholder: str = "*") -> None:
    """Write {placeholder: (S, D)} as safetensors; readers see the old file or the whole new one.

    The concept's metadata goes along, but does not replace what describes the format.
    """
    metadata = {key: str(value) for key, value in concept.metadata.items()} | {
        "format": "pt",
        "prospect.version": _VERSION,
        _STAGES: str(concept.num_stages),
        "prospect.num_timesteps": "1000",
        "prospect.order": "0 = low noise (end of generation), S-1 = high noise (start)",
        "placeholder": placeholder,
    }
    save_state_dict({placeholder: concept.vectors.cpu()}, path, metadata)


def load_concept(path: str | Path, key: str | None = None) -> Concept:
    """Read an embedding file of any known kind, told apart by its content; no code of the file is run.

    * this program's: (S, D) with metadata;
    * the reference's `.pt`, a pickled generator block: evaluated without dropout. (The reference samples with
      its dropout on when the file was saved during training.)
    * Textual Inversion of one vector, S = 1: diffusers (`.safetensors`, `.bin`), A1111 and rinongal (`.pt`).

    Args:
        path: the file.
        key: the name of the embedding in a file of several; a file of one gives that one, whatever its name.

    Raises:
        EmbeddingError: the file is missing, damaged or of another kind, names code, holds several embeddings
            or vectors for consecutive tokens, or is for Stable Diffusion XL.
    """
    path = Path(path)
    try:
        tensors, metadata = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
        vectors = tensors[_choose(list(tensors), key)]
        if not _is_plain(vectors) or vectors.ndim not in (1, 2):
            found = f"{vectors.dtype} of shape {tuple(vectors.shape)}"
            raise EmbeddingError(f"this is no embedding but {found}; use a file with vectors of one width.")
        vectors = torch.atleast_2d(vectors)
        _check_stages(len(vectors), metadata)
        return Concept(vectors, metadata)
    except OSError as error:
        raise EmbeddingError(f"'{path}': it cannot be read ({error.strerror}); check the path.") from error
    except EmbeddingError as error:
        raise EmbeddingError(f"'{path}': {error}") from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file is of safetensors, or else of torch; all other files are refused."""
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*") if file.is_file()]
        near = difflib.get_close_matches(path.name, siblings, n=1)
        remedy = f"did you mean '{path.with_name(near[0])}'?" if near else "check the path."
        raise EmbeddingError(f"{'this is a folder' if path.is_dir() else 'there is no such file'}; {remedy}")
    with path.open("rb") as stream:
        head = stream.read(16)
    if head[8:9] == b"{":
        return True
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise EmbeddingError("the file is cut off; copy or download it again.")
    if not head.startswith((b"PK", b"\x80")):
        found = f"the file begins with {head!r}" if head else "the file is empty"
        raise EmbeddingError(f"{found} and holds no embedding; use a .safetensors, .pt or .bin file of one.")
    return False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # a malformed file can fail in any way
        raise EmbeddingError(f"the file is damaged ({error}); copy or download it again.") from error


def _choose(names: list[str], key: str | None) -> str:
    if {"clip_l", "clip_g"} <= set(names):
        raise EmbeddingError("it is for Stable Diffusion XL (clip_l and clip_g); use one for version 1.")
    if key in names:
        return key
    if not names:
        raise EmbeddingError("the file holds no embedding; use one that does.")
    if len(names) > 1:
        listing = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
        raise EmbeddingError(f"the file holds {len(names)} embeddings ({listing}); give the name of one.")
    return names[0]


def _check_stages(rows: int, metadata: Mapping[str, str]) -> None:
    version, stages = metadata.get("prospect.version", _VERSION), metadata.get(_STAGES)
    if version != _VERSION:
        raise EmbeddingError(f"the file has format version {version}, not {_VERSION}; update this program.")
    if stages is None and rows != 1:
        raise EmbeddingError(
            f"its {rows} vectors are for {rows} consecutive tokens of a prompt, not for {rows} stages of "
            "denoising; use an embedding of one vector."
        )
    if stages is not None and stages != str(rows):
        raise EmbeddingError(f"there are {rows} vectors for {stages} stages; use another copy of the file.")


class _StandIn:
    """Stands in for every module class that a file names: keeps the pickled state as data, does nothing."""

    state: object = None

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def part(self, name: str) -> Mapping[object, object]:
        """`_parameters` or `_modules` of the pickled module; empty when there is no such thing."""
        found = self.state.get(name) if isinstance(self.state, Mapping) else None
        return found if isinstance(found, Mapping) else {}


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise EmbeddingError("the file holds no embedding; use one that does.")
    if "attention" in content:
        vectors = _run_generator(content["attention"], content.get("initial_embeddings"))
        return {"*": vectors}, {_STAGES: str(len(vectors))}
    parameters = content.get("string_to_param", content)
    if isinstance(parameters, _StandIn):  # rinongal: an nn.ParameterDict
        parameters = parameters.part("_parameters")
    tensors = parameters.items() if isinstance(parameters, Mapping) else ()
    return {str(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}, {}


def _unpickle(path: Path) -> object:
    """Torch's `weights_only` reader: makes tensors, plain data and stand-ins for modules; imports nothing."""
    try:
        with reading_with(_StandIn, lambda: _modules_in(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error))
        what = f"it names '{refused[1]}', which was not run" if refused else "it is damaged, or not only data"
        raise EmbeddingError(f"{what}; use another copy, best a .safetensors file that you trust.") from error


def _modules_in(path: Path) -> list[str]:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    return [name for name in unknown if name.startswith(_STAND_IN_FOR)]


@torch.no_grad()
def _run_generator(module: object, initial: object) -> Tensor:
    """The vectors (S, D) of the reference's pickled generator block for the initial embedding (1, D).

    Only tensors are taken from the file. The reference's `forward` replaces `string_to_param_dict`'s entries,
    never `initial_embeddings`, and takes one row of it, so that any other number of rows is an error here.
    """
    # Imported here because the manager's module imports this one.
    from ldm.modules.embedding_manager import GeneratorBlock

    if not isinstance(initial, Tensor) or not _is_plain(initial) or initial.ndim != 2 or len(initial) != 1:
        what = f"of shape {tuple(initial.shape)}" if isinstance(initial, Tensor) else "missing"
        raise EmbeddingError(f"initial_embeddings is {what}, not (1, width); use a file of ProSpect.")
    state = _parameters(module)
    width = max(initial.shape[1], 1)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    inner, rows = (next(iter(found.get(name, ())), 0) for name in ("attn1.to_q.weight", "ff.net.2.weight"))
    with torch.device("meta"):
        # One token: the softmax over it is 1 however the inner width is cut into heads.
        block = GeneratorBlock(width, max(rows // width, 1), heads=1, dim_head=max(inner, 1))
    expected = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        listing = ", ".join(f"{name} {found.get(name, 'missing')}" for name in wrong[:_LISTED])
        raise EmbeddingError(f"its network is not ProSpect's generator ({listing}); use a file of ProSpect.")
    block.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()}, assign=True)
    return block.eval()(initial.detach().float())


def _parameters(module: object) -> dict[str, Tensor]:
    """The parameters of a pickled module tree under their dotted names."""
    parameters: dict[str, Tensor] = {}
    pending, seen = [("", module)], set()
    while pending:
        prefix, node = pending.pop()
        # A module that is in two places could make the tree endless.
        if not isinstance(node, _StandIn) or id(node) in seen:
            raise EmbeddingError("its 'attention' is not ProSpect's generator; use a file of ProSpect.")
        seen.add(id(node))
        tensors = node.part("_parameters").items()
        parameters |= {f"{prefix}{k}": v for k, v in tensors if isinstance(v, Tensor) and _is_plain(v)}
        pending += [(f"{prefix}{k}.", v) for k, v in node.part("_modules").items() if v is not None]
    return parameters


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is made of floats that are all in the file, and not of a few repeated without end."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
