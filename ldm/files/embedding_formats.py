"""Embedding files of this and other programs: where in them the tensors are, and how stage files are named."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.files.kinds import identify, is_image
from ldm.files.tensors import TensorFileError, named_tensors, naming, read_file, read_head

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.+)-(\d+)\.(?:safetensors|pt|bin)")
_ADAPTER = "clip_text_model_self_prefix.control_trans"  # ends the names in CatVersion's pytorch_adapter.bin
_ADAPTED = {"9", "10", "11"}  # text layers that its code knows
WHOLE = "embeddings.safetensors"
LAYERS_FILE = "-layers.safetensors"  # ends the name of an exported concept with vectors for each U-Net layer
# A whole concept in a folder: of CatVersion, of `prospect push` or a run, and of diffusers and sd-concepts-library.
_WHOLE_FILES = (
    "pytorch_adapter.bin", WHOLE, f"checkpoints/{WHOLE}", "learned_embeds.safetensors", "learned_embeds.bin",
)  # fmt: skip
# kohya's train_textual_inversionXTI_LAYERS.py names the U-Net's cross-attention layers so, in order of execution.
XTI_LAYERS = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{k:02}" for k in range(3, 12))]
_A1111_CHUNK = "sd-ti-embedding"  # of a PNG: base64 of JSON, tensors as {"TORCHTENSOR": lists of numbers}


class PickledBlock(NamedTuple):
    """The reference's embedding file: its generator block's parameters by dotted names, and the initial embedding."""

    parameters: dict[str, Tensor]
    initial: Tensor | None


class FlatPrefix(NamedTuple):
    """CatVersion's released adapter: keys and values of the text layers 9, 10 and 11 as one vector."""

    values: Tensor


class PickledMapper(NamedTuple):
    """NeTI's `mapper-*.pt`: its state dict, the tensors of its positional encoding, and its configuration."""

    parameters: dict[str, Tensor]
    encoding: dict[str, Tensor]
    config: object


def read_embeddings(
    path: Path,
) -> tuple[dict[str, Tensor] | PickledBlock | PickledMapper | FlatPrefix, dict[str, str]]:
    """Return the embeddings of a file by name, and its metadata.

    Raises:
        TensorFileError: missing, damaged, of another kind, or it names code.
    """
    head = read_head(path)
    if is_image(head):
        return named_tensors(path, _read_png(path)), {}
    content, metadata, _ = read_file(path, head=head)
    content = content if isinstance(content, Mapping) else {}
    if "attention" in content:
        initial = named_tensors(path, {"initial": content.get("initial_embeddings")})
        return PickledBlock(named_tensors(path, content["attention"]), initial.get("initial")), metadata
    if content.keys() >= {"state_dict", "cfg", "encoder"}:
        parameters = named_tensors(path, content["state_dict"])
        # after a warm start the encoding's tensor is a parameter, else an attribute of the pickled module
        encoding = named_tensors(path, getattr(content["encoder"], "state", None))
        return PickledMapper(parameters, encoding, content["cfg"]), metadata
    state = content.get("state_dict")
    # of A1111 and rinongal one level down, by rinongal in an nn.ParameterDict
    tensors = named_tensors(path, content.get("string_to_param", content) if state is None else state)
    if any(name.endswith(_ADAPTER) for name in tensors):
        return FlatPrefix(_flat_prefix(path, tensors)), {}
    if set(tensors) == set(XTI_LAYERS):
        return {"table": _layers(path, [tensors[name] for name in XTI_LAYERS])}, metadata | {"prospect.method": "xti"}
    kind = "unknown" if "prospect.version" in metadata else identify(tensors)
    if state is not None or kind not in ("unknown", "a textual inversion embedding"):
        model = f"a base model ({kind})" if kind.startswith("Stable") else "a checkpoint"
        what = kind if kind in ("a LoRA", "a VAE") else model
        raise TensorFileError(f"'{path}' holds {what} and no embedding; use a learned concept (of a run: {WHOLE}).")
    return tensors, metadata


def _flat_prefix(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the one vector that CatVersion's adapter holds under up to four names."""
    first, *others = tensors.values()
    layers = {found[1] for name in tensors if (found := re.search(r"\.layers\.(\d+)\.", name))}
    is_adapter = layers <= _ADAPTED and all(name.endswith(_ADAPTER) for name in tensors)
    if not is_adapter or any(not torch.equal(first, other) for other in others):
        raise TensorFileError(f"'{path}' is no prefix of CatVersion, the same for the text layers 9, 10 and 11.")
    return first


def _layers(path: Path, vectors: Sequence[Tensor]) -> Tensor:
    """Return (1, layers, n, D) from a tensor (n, D) or (D,) for each layer."""
    if len({x.shape for x in vectors}) != 1 or vectors[0].ndim not in (1, 2):
        raise TensorFileError(f"'{path}': its layers' vectors have different sizes; use another copy.")
    table = torch.stack(list(vectors)).float()
    return table.unsqueeze(0) if table.ndim == 3 else table[None, :, None]


def _read_png(path: Path) -> object:
    """Return what A1111 stores in an image of an embedding."""
    try:
        with Image.open(path) as image:
            chunk = image.info.get(_A1111_CHUNK)
        content = json.loads(base64.b64decode(chunk))
        return {name: torch.tensor(entry["TORCHTENSOR"]) for name, entry in content["string_to_param"].items()}
    except Exception as error:  # a malformed file can fail in any way
        raise TensorFileError(
            f"'{path}' is an image without a readable embedding in it; use a .safetensors, .pt or .bin file."
        ) from error


def read_modules(path: Path) -> list[dict[str, Tensor]]:
    """Return the parameters of the modules that a file of StyleDiffusion lists, one for each denoising step.

    Raises:
        TensorFileError: missing, damaged, or it names code.
    """
    content = read_file(path).content
    return [named_tensors(path, module) for module in (content if content and isinstance(content, list) else [content])]


def concept_file(path: Path) -> Path:
    """Return the file of a folder that holds a whole concept, also in the folder of a run; other paths as they are.

    Raises:
        TensorFileError: a folder of NeTI's mappers.
    """
    if not path.is_dir():
        mapper = path.with_name(path.name.replace("learned_embeds-", "mapper-")).with_suffix(".pt")
        if path.name.startswith("learned_embeds-") and mapper.is_file():
            logger.warning("'%s' is only the word that NeTI begins with; what it learned is in '%s'.", path, mapper)
        return path
    if mappers := sorted(path.glob("mapper-*.pt"), key=lambda file: file.stat().st_mtime):
        raise TensorFileError(f"'{path}' is the folder of a NeTI run; give one mapper of it, such as '{mappers[-1]}'.")
    layered = list(path.glob(f"*{LAYERS_FILE}"))
    whole = [*(path / name for name in _WHOLE_FILES), *(layered if len(layered) == 1 else ())]
    return next(filter(Path.is_file, whole), path)


def placeholder_beside(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the name of another program's embedding: token_identifier.txt beside it, or the only name like <this>."""
    beside = path.with_name("token_identifier.txt")
    is_short = beside.is_file() and beside.stat().st_size <= 1000
    text = beside.read_text(encoding="utf-8", errors="replace").strip() if is_short else ""
    found = text if text.isprintable() and len(text) <= 100 else ""
    if not found and len(names) == 1 and re.fullmatch(r"<[^<>*]{1,100}>", names[0]):
        found = names[0]
    return {"placeholder": found} if found else {}


# A concept in as many files as it has stages


def _by_series(paths: Iterable[Path]) -> dict[str, dict[int, Path]]:
    """Return the files `name-0`, `name-1`, … among `paths` by name and number."""
    found: dict[str, dict[int, Path]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    return found


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Return files `name-0`, `name-1`, … by their numbers (a shell puts 10 before 2); others as they are."""
    files = next(iter(_by_series(paths).values()), {})
    return [files[number] for number in sorted(files)] if len(files) == len(paths) else list(paths)


def series(place: Path, name: str | None = None) -> list[Path]:
    """Return the files `name-0`, … of a folder, or those that belong to one of them.

    Args:
        name: may be omitted where a folder has only one series.

    Raises:
        TensorFileError: there are no such files, or some are missing.
    """
    folder = place if place.is_dir() else place.parent
    with naming(folder):
        found = _by_series(sorted(folder.iterdir()))
    if place == folder:
        what, name = "is a folder; it", name if name in found or len(found) != 1 else next(iter(found))
    else:
        what, name = "is one stage of a concept; its folder", next(iter(_by_series([place])), None)
    if name not in found:
        there = f"those of {', '.join(found)}" if found else "none"
        raise TensorFileError(
            f"'{place}' {what} must have the stage files name-0, name-1, … of one concept, and has {there}; give one "
            "file, a list of files, or the name (key=…, or --key of scripts/import_embedding.py)."
        )
    files = found[name]
    numbers = sorted(files)
    if numbers != list(range(len(files))):
        there = ", ".join(map(str, numbers))
        raise TensorFileError(f"'{folder}': of '{name}' there are only the stage files {there}; add the missing ones.")
    return [files[number] for number in numbers]
