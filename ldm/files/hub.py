"""Concepts on the Hugging Face hub: a repository `hf:user/name[@revision]` becomes a folder here, and a folder one.

Only safetensors, JSON and YAML are ever fetched. With HF_HUB_OFFLINE=1 nobody is asked, and what was fetched is used.
What the record of an image names is fetched again, but not for the first time.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "hf:"
SUFFIXES = (".safetensors", ".json", ".yaml")
MAX_BYTES = 100 << 20  # a concept has kilobytes; a whole model is none
_SOURCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)[\w./-]{1,200}))?")  # a revision is part of a path, too


def is_hub(source: object) -> bool:
    """Return whether a concept's source is a repository on the hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def fetch(source: str) -> tuple[Path, str]:
    """Return the folder with a repository's files, and the source with the commit that they are of.

    Raises:
        ValueError: it is no such source, there is no such repository, or it holds no concept.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"'{source}' must be hf:user/name, or hf:user/name@revision.")
    repository, revision = match.groups()
    from huggingface_hub import constants, snapshot_download

    with _one_sentence(source):
        wanted = None if constants.HF_HUB_OFFLINE else _wanted(repository, revision, source)
        only_here = wanted is None
        found = snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=only_here)
    folder = Path(found)
    return folder, f"{PREFIX}{repository}@{folder.name}"


def refuse_unfetched(concepts: object) -> None:
    """Raise `ValueError` where a concept of an image's record was never fetched: that is for the user to ask for."""
    from huggingface_hub import constants

    for source in filter(is_hub, concepts.values() if isinstance(concepts, Mapping) else ()):
        match = _SOURCE.fullmatch(source)
        repository, commit = match.groups() if match else ("", None)
        fetched = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots", commit or "-")
        if not any(fetched.glob(f"*{SUFFIXES[0]}")):
            what = f"The image names the concept '{source}', which was not fetched before"
            raise ValueError(f"{what}, and an image's record fetches nothing; if you trust it, give it with --concept.")


def _wanted(repository: str, revision: str | None, source: str) -> list[str] | None:
    """Return patterns of the files of a concept's repository; None where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        if not _is_network(error):
            raise
        logger.warning("The hub does not answer; what was fetched of '%s' before is used.", source)
        return None
    files = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    wanted = [name for name in files if name.endswith(SUFFIXES)]
    if not any(name.endswith(SUFFIXES[0]) for name in wanted):
        pickles = [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
        remedy = f"; download '{pickles[0]}' yourself and give the file" if pickles else ""
        raise ValueError(f"'{source}' has no .safetensors file, and no other kind is fetched{remedy}.")
    if (size := sum(files[name] for name in wanted)) > MAX_BYTES:
        raise ValueError(f"'{source}' is no concept: its files have {size >> 20} MB.")
    return [glob.escape(name) for name in wanted]  # a name may be a pattern that matches others


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Make a repository, if there is none, and put the files of a folder into it; returns its address.

    Raises:
        ValueError: the name is none, nobody is logged in, or the hub refuses it.
    """
    from huggingface_hub import HfApi, constants

    with _one_sentence(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `ValueError` with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:  # it answered
        status = error.response.status_code
        remedy = "check the name and what stands behind an @, or log in with `hf auth login`"
        raise ValueError(f"The hub has no '{what}', or refuses it (status {status}); {remedy}.") from error
    except Exception as error:
        if not isinstance(error, errors.LocalEntryNotFoundError) and not _is_network(error):
            raise
        raise ValueError(f"The hub cannot be reached for '{what}'; check the network and HF_HUB_OFFLINE.") from error


def _is_network(error: Exception) -> bool:
    """Return whether the hub's client could not ask; its own client's errors, whichever version of httpx that is."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):  # it answered
        return False
    of_client = any(kind.__module__.startswith(("httpx", "httpcore")) for kind in type(error).__mro__)
    return of_client or isinstance(error, (ConnectionError, TimeoutError))
