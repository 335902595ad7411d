"""Which base model a concept belongs to: the SHA-256 of the file that the weights came from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ldm.checkpoint import file_hash

REMEMBERED_FROM = 1 << 28  # bytes; smaller files are hashed in less than half a second


def base_hash(path: str | Path) -> str:
    """`file_hash` of a base model, which for a large file is remembered between runs (in the user's cache folder).

    A file with another size or time of change is hashed again.

    Raises:
        CheckpointError: there is no such file.
    """
    path = Path(path).absolute()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files if file.is_file())]
    if sum(size for size, _ in stamps) < REMEMBERED_FROM:
        return file_hash(path)
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prospect-ldm" / "sha256.json"
    stamp = repr(stamps)
    known = _read(store)
    entry = known.get(str(path))
    if isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp:
        return str(entry[1])
    found = file_hash(path)
    with contextlib.suppress(OSError):  # a home that cannot be written to only costs the time again
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_name(f".{store.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_read(store) | {str(path): [stamp, found]}), encoding="utf-8")
        os.replace(temporary, store)
    return found


def _read(store: Path) -> dict[str, object]:
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_other_base(metadata: Mapping[str, str], base: str | Path, concept: str) -> None:
    """Say so where a concept was learned for another base model than the file or folder `base`.

    A concept that does not say what it was learned for (another program's) fits all.

    Args:
        metadata: the concept's; `base_model_sha256` decides, without it the name `base_model` does.
        concept: how to call it.

    Raises:
        ValueError: it was, with both named.
    """
    base = Path(base)
    wanted, name = metadata.get("base_model_sha256"), metadata.get("base_model")
    if not (wanted or name) or not base.exists():
        return
    found = base_hash(base) if wanted else None
    if (wanted == found) if wanted else (name == base.name):
        return
    learned_for, is_now = f"'{name or 'unknown'}'", f"'{base.name}'"
    if wanted:
        learned_for, is_now = f"{learned_for} (SHA-256 {wanted[:10]}…)", f"{is_now} ({found[:10]}…)"
    raise ValueError(
        f"{concept} was learned for the base model {learned_for}, but this is {is_now}; use it with that model, or "
        "say any_base=True (--any_base) where the two are relatives, such as a fine-tune or a half-precision copy."
    )
