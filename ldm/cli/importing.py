"""`scripts/import_embedding.py` and `prospect import`. Imports nothing heavy before the flags are read."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli.flags import add_flag, check_paths, path, script_parser
from ldm.files.hub import is_hub
from ldm.files.shipped import shipped
from ldm.files.writing import check_new_file


def run(docstring: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> str:
    """Read embeddings of another program into one concept, and write it; returns what was written.

    Args:
        docstring: the command's; its first line, then examples.
    """
    parser = script_parser(docstring, prog)
    help_source = "a file, the folder of the stage files, or these files, the end of sampling (low noise) first"
    parser.add_argument("source", nargs="+", type=shipped, metavar="FILE", help=help_source)
    add_flag(parser, "--out", type=path, required=True, metavar="FILE", help="the .safetensors file to write")
    add_flag(parser, "--key", metavar="NAME", help="which embedding, where there are several")
    help_rows = "the vectors of a file are stages, the end of sampling first, and not consecutive tokens"
    add_flag(parser, "--rows_are_stages", action="store_true", help=help_rows)
    help_placeholder = "what it is called in prompts (its own name, or '*')"
    add_flag(parser, "--placeholder", metavar="TEXT", help=help_placeholder)
    help_caption = "captions that it was learned in; CatVersion's adapters do not say their class word"
    add_flag(parser, "--caption", nargs="+", metavar="TEXT", help=help_caption)
    add_flag(parser, "--force", action="store_true", help="overwrite the file if it is there")
    options = parser.parse_strictly(argv)
    with parser.sentences():
        check_paths({"FILE": [file for file in options.source if not is_hub(file)]})
        check_new_file(options.out, options.force, options.source)
        from ldm.embeddings import Concept, load_concept, save_new_concept

        source: str | list[str] = options.source[0] if len(options.source) == 1 else options.source
        concept = load_concept(source, options.key, options.rows_are_stages)
        if options.caption:
            said = concept.metadata | {"captions": "\n".join(options.caption)}
            concept = Concept(concept.tensors, said, concept.method)
        placeholder = options.placeholder or concept.metadata.get("placeholder", "*")
        save_new_concept(concept, options.out, placeholder, options.force, options.source)
    return f"{options.out}: {concept}, called {placeholder}"
