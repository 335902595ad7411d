"""Read an embedding of another program, or the files of its stages, into one concept.

python scripts/import_embedding.py outputs/star/star-*.safetensors --out star.safetensors
python scripts/import_embedding.py embeddings_gs-599.pt --out teddy.safetensors
python scripts/import_embedding.py mapper-steps-500.pt learned_embeds-steps-500.bin --out teapot.safetensors
python scripts/import_embedding.py learned_embeds.bin --key "<cat-toy>" --out cat-toy.safetensors
python scripts/import_embedding.py logs/teddybear/checkpoints/adapter_gs-999 --caption teddybear --out teddy.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm.cli.flags import check_paths, path, script_parser
from ldm.files.hub import is_hub
from ldm.files.shipped import shipped
from ldm.files.writing import check_new_file


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> list[str]:
    """Read embeddings of another program into one concept, and write it; returns what was written."""
    parser = script_parser(__doc__, prog)
    help_source = "a file, the folder of the stage files, or these files, the end of sampling (low noise) first"
    parser.add_argument("source", nargs="+", type=shipped, metavar="FILE", help=help_source)
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--key", metavar="NAME", help="which embedding, where there are several")
    help_rows = "the vectors of a file are stages, the end of sampling first, and not consecutive tokens"
    parser.add_argument("--rows_are_stages", action="store_true", help=help_rows)
    parser.add_argument("--placeholder", metavar="TEXT", help="what it is called in prompts (its own name, or '*')")
    help_caption = "captions that it was learned in; CatVersion's adapters do not say their class word"
    parser.add_argument("--caption", nargs="+", metavar="TEXT", help=help_caption)
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    return parser.run(_import, argv)


def _import(options: argparse.Namespace) -> list[str]:
    check_paths({"FILE": [file for file in options.source if not is_hub(file)]})
    check_new_file(options.out, options.force, options.source)
    from ldm.embeddings import Concept, load_concept, save_new_concept

    source = options.source[0] if len(options.source) == 1 else options.source
    concept = load_concept(source, options.key, options.rows_are_stages)
    if options.caption:
        said = concept.metadata | {"captions": "\n".join(options.caption)}
        concept = Concept(concept.tensors, said, concept.method)
    placeholder = options.placeholder or concept.metadata.get("placeholder", "*")
    save_new_concept(concept, options.out, placeholder, options.force, options.source)
    return [f"{options.out}: {concept}, called {placeholder}"]
