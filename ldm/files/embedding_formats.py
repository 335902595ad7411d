"""Embedding files of this and other programs: where in them the tensors are, and how stage files are named."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.files.kinds import identify, is_image
from ldm.files.tensors import StandIn, TensorFileError, named_tensors, naming, read_file, read_head

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.+)-(\d+)\.(?:safetensors|pt|bin)")
_ADAPTER = "clip_text_model_self_prefix.control_trans"  # ends the names in CatVersion's pytorch_adapter.bin
_ADAPTED = {"9", "10", "11"}  # text layers that its code knows
# A concept in a folder of the hub: of `prospect push`, and of diffusers and sd-concepts-library.
WHOLE = "embeddings.safetensors"
LAYERS_FILE = "-layers.safetensors"  # ends the name of an exported concept with vectors for each U-Net layer
_WHOLE_FILES = (WHOLE, "learned_embeds.safetensors", "learned_embeds.bin")
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
        return named_tensors(path, _string_to_param(_read_png(path))), {}
    content, metadata, _ = read_file(path, head=head)
    if isinstance(content, Mapping) and "attention" in content:
        parameters = named_tensors(path, _parameters(path, content["attention"]))
        initial = named_tensors(path, {"initial_embeddings": content.get("initial_embeddings")})
        return PickledBlock(parameters, initial.get("initial_embeddings")), metadata
    if isinstance(content, Mapping) and content.keys() >= {"state_dict", "cfg", "encoder"}:
        parameters = named_tensors(path, content["state_dict"])
        # after a warm start the encoding's tensor is a parameter, else an attribute of the pickled module
        encoding = named_tensors(path, getattr(content["encoder"], "state", None))
        return PickledMapper(parameters, encoding, content["cfg"]), metadata
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    tensors = named_tensors(path, _string_to_param(content) if state is None else state)
    if any(name.endswith(_ADAPTER) for name in tensors):
        return FlatPrefix(_flat_prefix(path, tensors)), {}
    if set(tensors) == set(XTI_LAYERS):
        return {"table": _layers(path, [tensors[name] for name in XTI_LAYERS])}, metadata | {"prospect.method": "xti"}
    kind = identify(tensors) if "prospect.version" not in metadata else "unknown"
    if state is not None or kind not in ("unknown", "a textual inversion embedding"):
        model = f"a base model ({kind})" if kind.startswith("Stable") else "a checkpoint"
        what = kind if kind in ("a LoRA", "a VAE") else model
        raise TensorFileError(f"'{path}' holds {what} and no embedding; use a file of a learned concept.")
    return tensors, metadata


def _flat_prefix(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the one vector that CatVersion's adapter holds under up to four names."""
    first, *others = tensors.values()
    layers = {found[1] for name in tensors if (found := re.search(r"\.layers\.(\d+)\.", name))}
    if layers - _ADAPTED or not all(name.endswith(_ADAPTER) for name in tensors):
        raise TensorFileError(f"'{path}' is a prefix for other layers than CatVersion's (9, 10, 11); use one of those.")
    if any(not torch.equal(first, other) for other in others):
        raise TensorFileError(
            f"'{path}': its {len(tensors)} copies of the prefix differ; use another copy of the file."
        )
    return first


def _layers(path: Path, vectors: Sequence[Tensor]) -> Tensor:
    """Return (1, layers, n, D) from a tensor (n, D) or (D,) for each layer."""
    rows = [x.unsqueeze(0) if x.ndim == 1 else x for x in vectors]
    if len({x.shape for x in rows}) != 1 or rows[0].ndim != 2:
        raise TensorFileError(f"'{path}': its layers' vectors have different sizes; use another copy.")
    return torch.stack(rows).unsqueeze(0).float()


def _string_to_param(content: object) -> object:
    """Return the tensors of A1111 and rinongal, kept one level down, by rinongal in an nn.ParameterDict."""
    found = content.get("string_to_param", content) if isinstance(content, Mapping) else None
    return found.part("_parameters") if isinstance(found, StandIn) else found


def _read_png(path: Path) -> object:
    """Return what A1111 stores in an image of an embedding."""
    try:
        with Image.open(path) as image:
            chunk = image.info.get(_A1111_CHUNK)
        content = json.loads(base64.b64decode(chunk))
        parameters = {name: torch.tensor(entry["TORCHTENSOR"]) for name, entry in content["string_to_param"].items()}
        return {"string_to_param": parameters}
    except Exception as error:  # a malformed file can fail in any way
        raise TensorFileError(
            f"'{path}' is an image without a readable embedding in it; use a .safetensors, .pt or .bin file."
        ) from error


def read_modules(path: Path) -> list[dict[str, Tensor]]:
    """Return the parameters of the modules that a file of StyleDiffusion lists, one for each denoising step.

    Raises:
        TensorFileError: missing, damaged, of another kind, or it names code.
    """
    content, refusal = read_file(path).content, "it holds no mapping networks of StyleDiffusion; use its .pth file"
    if not isinstance(content, list) or not content:
        raise TensorFileError(f"'{path}': {refusal}.")
    return [named_tensors(path, _parameters(path, module, refusal)) for module in content]


def _parameters(
    path: Path,
    module: object,
    refusal: str = "its 'attention' is not ProSpect's generator; use a file of ProSpect",
) -> dict[str, object]:
    """Return the parameters of a pickled module tree under their dotted names."""
    parameters: dict[str, object] = {}
    pending: list[tuple[str, object]] = [("", module)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        # A module that is in two places could make the tree endless.
        if not isinstance(node, StandIn) or id(node) in seen:
            raise TensorFileError(f"'{path}': {refusal}.")
        seen.add(id(node))
        parameters |= {f"{prefix}{name}": value for name, value in node.part("_parameters").items()}
        pending += [(f"{prefix}{name}.", value) for name, value in node.part("_modules").items() if value is not None]
    return parameters


def refuse_run(path: Path) -> None:
    """Raise `TensorFileError` for a run's folder or a checkpoint to resume it from, if its concept lies there."""
    if path.is_dir():
        what, folder = "is the folder of a run", path if path.name == "checkpoints" else path / "checkpoints"
    else:
        what, folder = "is to resume a run from", path.parent
    concept = folder / "embeddings.safetensors"
    if (path.is_dir() or path.name in ("last.ckpt", "previous.ckpt")) and concept.is_file():
        raise TensorFileError(f"'{path}' {what}; its concept is '{concept}'.")


def check_beside_mapper(path: Path) -> None:
    """Refuse a folder of NeTI's mappers, and warn of the word beside a mapper.

    Raises:
        TensorFileError: it is such a folder.
    """
    mappers = sorted(path.glob("mapper-*.pt"), key=lambda file: file.stat().st_mtime) if path.is_dir() else []
    if mappers:
        raise TensorFileError(f"'{path}' is the folder of a NeTI run; give one mapper of it, such as '{mappers[-1]}'.")
    mapper = path.with_name(path.name.replace("learned_embeds-", "mapper-")).with_suffix(".pt")
    if path.name.startswith("learned_embeds-") and mapper.is_file():
        logger.warning("'%s' is only the word that NeTI begins with; what it learned is in '%s'.", path, mapper)


def whole_in(folder: Path) -> Path | None:
    """Return the file of a folder that holds a whole concept, where it has one of the names that the hub's have."""
    whole = [folder / name for name in _WHOLE_FILES if (folder / name).is_file()]
    layered = sorted(folder.glob(f"*{LAYERS_FILE}"))
    if not whole and len(layered) == 1:
        return layered[0]
    return whole[0] if whole else None


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


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Return files `name-0`, `name-1`, … by their numbers (a shell puts 10 before 2); others as they are."""
    found = [match for path in paths if (match := _NUMBERED.fullmatch(path.name))]
    if len(found) == len(paths) and len({match[1] for match in found}) == 1:
        return [path for _, path in sorted(zip((int(match[2]) for match in found), paths, strict=True))]
    return list(paths)


def series_of(path: Path) -> str:
    """Return the `name` of a stage file `name-3`."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        raise TensorFileError(
            f"'{path}' is one stage of a concept, and not named name-0, name-1, …; list all its files."
        )
    return match[1]


def series(folder: Path, name: str | None) -> list[Path]:
    """Return the files `name-0`, … of a folder; without such a name, those of the only series that there is."""
    found: dict[str, dict[int, Path]] = {}
    with naming(folder):
        for path in sorted(folder.iterdir()):
            if match := _NUMBERED.fullmatch(path.name):
                found.setdefault(match[1], {})[int(match[2])] = path
    if name not in found:
        if len(found) != 1:
            there = f"those of {', '.join(found)}" if found else "none"
            raise TensorFileError(
                f"'{folder}' is a folder; it must have the stage files name-0, name-1, … of one concept, and has "
                f"{there}; give one file, a list of files, or the name (key=…, or --key of "
                "scripts/import_embedding.py)."
            )
        name = next(iter(found))
    files = found[name]
    numbers = sorted(files)
    if numbers != list(range(len(files))):
        there = ", ".join(map(str, numbers))
        raise TensorFileError(f"'{folder}': of '{name}' there are only the stage files {there}; add the missing ones.")
    return [files[k] for k in numbers]
