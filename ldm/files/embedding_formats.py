"""What embedding files hold, whichever program wrote them: tensors by name, and metadata; no code of a file is run."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.files.weights import is_whole, packed_size, reading_with
from ldm.memory import MemoryShort, check

STAGES = "prospect.num_stages"
_STAND_IN_FOR = ("ldm.", "torch.nn.modules.")
_LISTED = 8
_NUMBERED = re.compile(r"(.+)-(\d+)\.(?:safetensors|pt|bin)")


class EmbeddingError(ValueError):
    """An embedding that cannot be used: one sentence: which file, what is wrong with it, what to do."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's or folder's name in front of what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise EmbeddingError(f"'{path}': it cannot be read ({error.strerror}); check the path.") from error
    except EmbeddingError as error:
        raise EmbeddingError(f"'{path}': {error}") from error


def read_embeddings(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The embeddings of a file by name, and its metadata; the kind of file is told by its content.

    Raises:
        EmbeddingError: missing, damaged, of another kind, or it names code. The message reads on after the path.
    """
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def refuse_run(path: Path) -> None:
    """Raise `EmbeddingError` for a run's folder or a checkpoint to resume it from, if its concept lies there."""
    if path.is_dir():
        what, folder = "this is the folder of a run", path if path.name == "checkpoints" else path / "checkpoints"
    else:
        what, folder = "this is to resume a run from", path.parent
    concept = folder / "embeddings.safetensors"
    if (path.is_dir() or path.name in ("last.ckpt", "previous.ckpt")) and concept.is_file():
        raise EmbeddingError(f"{what}; its concept is '{concept}'.")


def short_hash(path: str | Path) -> str | None:
    """The first 12 digits of a file's SHA-256, as AUTOMATIC1111's web UI shows them; None where it is no file."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is made of floats that are all in the file, and not of a few repeated without end."""
    return tensor.is_floating_point() and is_whole(tensor)


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
        return {"*": vectors}, {STAGES: str(len(vectors))}
    parameters = content.get("string_to_param", content)
    if isinstance(parameters, _StandIn):  # rinongal: an nn.ParameterDict
        parameters = parameters.part("_parameters")
    tensors = parameters.items() if isinstance(parameters, Mapping) else ()
    return {str(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}, {}


def _unpickle(path: Path) -> object:
    """Torch's `weights_only` reader: makes tensors, plain data and stand-ins for modules; imports nothing."""
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and (unpacked := packed_size(path)):
            check(unpacked, "cpu", "the file, unpacked,", "a .safetensors version of it")
        with reading_with(_StandIn, lambda: _modules_in(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryShort as error:
        raise EmbeddingError(str(error)) from error
    except Exception as error:  # a malformed file can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error))
        if refused and refused[1].startswith(_STAND_IN_FOR) and not is_zip:
            raise EmbeddingError(
                "it is in the format that torch wrote before 1.6; write it anew with a newer torch where it was made: "
                "torch.save(torch.load(file), file)."
            ) from error
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
    from ldm.methods.prospect import GeneratorBlock

    if not isinstance(initial, Tensor) or not is_plain(initial) or initial.ndim != 2 or len(initial) != 1:
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
        parameters |= {f"{prefix}{k}": v for k, v in tensors if isinstance(v, Tensor) and is_plain(v)}
        pending += [(f"{prefix}{k}.", v) for k, v in node.part("_modules").items() if v is not None]
    return parameters


# A concept in as many files as it has stages


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Files `name-0`, `name-1`, … by their numbers (a shell puts 10 before 2); others as they are."""
    found = [_NUMBERED.fullmatch(path.name) for path in paths]
    if all(found) and len({match[1] for match in found}) == 1:
        return sorted(paths, key=lambda path: int(_NUMBERED.fullmatch(path.name)[2]))
    return list(paths)


def series_of(path: Path) -> str:
    """The `name` of a stage file `name-3`."""
    match = _NUMBERED.fullmatch(path.name)
    with naming(path):
        if match is None:
            raise EmbeddingError("this is one stage of a concept, and not named name-0, name-1, …; list all its files.")
    return match[1]


def series(folder: Path, name: str | None) -> list[Path]:
    """The files `name-0`, … of a folder; without such a name, those of the only series that there is."""
    found: dict[str, dict[int, Path]] = {}
    with naming(folder):
        for path in sorted(folder.iterdir()):
            if match := _NUMBERED.fullmatch(path.name):
                found.setdefault(match[1], {})[int(match[2])] = path
        if name not in found:
            if len(found) != 1:
                there = f"those of {', '.join(found)}" if found else "none"
                raise EmbeddingError(
                    "this is a folder; it must have the stage files name-0, name-1, … of one concept, and has "
                    f"{there}; give one file, a list of files, or the name (key=…, or --key of "
                    "scripts/import_embedding.py)."
                )
            name = next(iter(found))
        files = found[name]
        numbers = sorted(files)
        if numbers != list(range(len(files))):
            there = ", ".join(map(str, numbers))
            raise EmbeddingError(f"of '{name}' there are only the stage files {there}; add those that are missing.")
        return [files[k] for k in numbers]
