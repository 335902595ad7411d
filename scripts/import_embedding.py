"""Read an embedding of another program, or the files of its stages, into one concept.

python scripts/import_embedding.py outputs/star/star-*.safetensors --out star.safetensors
python scripts/import_embedding.py embeddings_gs-599.pt --out teddy.safetensors
python scripts/import_embedding.py mapper-steps-500.pt learned_embeds-steps-500.bin --out teapot.safetensors
python scripts/import_embedding.py learned_embeds.bin --key '<cat-toy>' --out cat-toy.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.flags import Parser, add_flag, say


def main() -> None:
    summary, _, examples = __doc__.partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=summary, epilog="examples:\n" + examples.strip("\n"), formatter_class=raw)
    help_source = "a file, the folder of the stage files, or these files, the end of sampling (low noise) first"
    parser.add_argument("source", nargs="+", type=Path, help=help_source)
    add_flag(parser, "--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add_flag(parser, "--key", metavar="NAME", help="which embedding, where there are several")
    help_rows = "the vectors of a file are stages, the end of sampling first, and not consecutive tokens"
    add_flag(parser, "--rows_are_stages", action="store_true", help=help_rows)
    add_flag(parser, "--placeholder", default="*", metavar="TEXT", help="what it is called in prompts ('*')")
    add_flag(parser, "--force", action="store_true", help="overwrite the file if it is there")
    options = parser.parse_strictly()
    with parser.sentences():
        from ldm.embeddings import load_concept, save_new_concept

        source = options.source[0] if len(options.source) == 1 else options.source
        concept = load_concept(source, options.key, options.rows_are_stages)
        save_new_concept(concept, options.out, options.placeholder, options.force, options.source)
    say(f"{options.out}: {concept}")


if __name__ == "__main__":
    main()
