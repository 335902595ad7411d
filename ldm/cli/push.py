"""`prospect push`: a concept, its stage files and a model card to the Hugging Face hub."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.flags import add_flag, check_paths, input_path, path, script_parser
from ldm.files.shipped import quoted


def run(docstring: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> list[str]:
    """Upload what the flags ask for; returns the repository's address, and how the concept is used from there.

    Args:
        docstring: the command's; its first line, then examples.
    """
    parser = script_parser(docstring, prog)
    parser.add_argument("concept", type=input_path, metavar="CONCEPT", help="embedding file")
    parser.add_argument("repository", metavar="USER/NAME", help="where to; made if it is not there")
    add_flag(parser, "--private", action="store_true", help="make the new repository a private one")
    add_flag(parser, "--license", default="creativeml-openrail-m", metavar="ID", help="(creativeml-openrail-m)")
    add_flag(parser, "--base_model", metavar="ID", help="the base model's name on the hub")
    add_flag(
        parser, "--images", nargs="+", type=input_path, default=[], metavar="FILE", help="samples for the model card"
    )
    add_flag(parser, "--outdir", type=path, metavar="DIR", help="write the repository into this folder instead")
    options = parser.parse_strictly(argv)
    with parser.sentences():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository) is None:
            raise ValueError(f"'{options.repository}' is no name of a repository; it must be user/name.")
        check_paths({"CONCEPT": [options.concept], "--images": options.images})
        return _push(options)


def _push(options: argparse.Namespace) -> list[str]:
    from ldm.embeddings import load_concept
    from ldm.export.card import Card
    from ldm.export.files import write_repository
    from ldm.files.hub import upload

    concept, name = load_concept(options.concept), options.repository.partition("/")[2]
    place = options.outdir
    if place is not None and place.exists() and (place.is_file() or any(place.iterdir())):
        raise ValueError(f"'{place}' is not an empty folder; name a new one with --outdir.")
    card = Card(options.license, options.base_model, options.images)
    if options.outdir is not None:
        return [str(file) for file in write_repository(concept, name, options.outdir, card)]
    with tempfile.TemporaryDirectory() as place:
        write_repository(concept, name, Path(place) / name, card)
        address = upload(Path(place) / name, options.repository, options.private, f"Add the concept {name}")
    called = concept.metadata.get("placeholder", "*")
    words = ("--concept", f"hf:{options.repository}", "--prompt", f"a {called}")
    return [address, " ".join(["prospect generate", *map(quoted, words)])]
