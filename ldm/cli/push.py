"""Upload a concept to the Hugging Face hub, with its stage files and a model card.

prospect push logs/…/checkpoints/embeddings.safetensors user/name --images outputs/a-42.png
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.flags import check_paths, input_path, path, script_parser
from ldm.files.shipped import quoted


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> list[str]:
    """Upload what the flags ask for; returns the repository's address, and how the concept is used from there."""
    parser = script_parser(__doc__, prog)
    parser.add_argument("concept", type=input_path, metavar="CONCEPT", help="embedding file")
    parser.add_argument("repository", metavar="USER/NAME", help="where to; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the new repository a private one")
    parser.add_argument("--license", default="creativeml-openrail-m", metavar="ID", help="(creativeml-openrail-m)")
    parser.add_argument("--base_model", metavar="ID", help="the base model's name on the hub")
    parser.add_argument("--images", nargs="+", type=input_path, default=[], metavar="FILE", help="samples for the card")
    parser.add_argument("--outdir", type=path, metavar="DIR", help="write the repository into this folder instead")
    return parser.run(_push, argv)


def _push(options: argparse.Namespace) -> list[str]:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository) is None:
        raise ValueError(f"'{options.repository}' is no name of a repository; it must be user/name.")
    check_paths({"CONCEPT": [options.concept], "--images": options.images})
    if (place := options.outdir) is not None and place.exists() and (place.is_file() or any(place.iterdir())):
        raise ValueError(f"'{place}' is not an empty folder; name a new one with --outdir.")
    from ldm.embeddings import load_concept
    from ldm.export.card import Card
    from ldm.export.files import write_repository
    from ldm.files.hub import upload

    concept, name = load_concept(options.concept), options.repository.partition("/")[2]
    card = Card(options.license, options.base_model, options.images)
    if place is not None:
        return [str(file) for file in write_repository(concept, name, place, card)]
    with tempfile.TemporaryDirectory() as folder:
        write_repository(concept, name, Path(folder) / name, card)
        address = upload(Path(folder) / name, options.repository, options.private, f"Add the concept {name}")
    called = concept.metadata.get("placeholder", "*")
    words = ("--concept", f"hf:{options.repository}", "--prompt", f"a {called}")
    return [address, " ".join(["prospect generate", *map(quoted, words)])]
