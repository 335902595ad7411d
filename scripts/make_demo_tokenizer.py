"""Write the demo's CLIP-format tokenizer: every word of the rendered world is one token.

python scripts/make_demo_tokenizer.py --out models/demo/tokenizer
"""

import argparse
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import path, positive, script_parser
from ldm.files.writing import replacing_set

END = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes in CLIP's vocabulary, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges, most frequent pair first, until every word is one token.

    Encoding repeats the merges in the order they were learnt, so no word can break another one's merges.
    """
    splits = [[*word[:-1], word[-1] + END] for word in words]
    merges = []
    while pairs := Counter(pair for split in splits for pair in pairwise(split)):
        # Ties are broken by the alphabet, which makes the files reproducible.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = [merge(split, best) for split in splits]
    return merges


def merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair, from the left."""
    merged: list[str] = []
    for symbol in split:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_tokenizer(folder: Path, max_length: int) -> int:
    """Write vocab.json, merges.txt, words.txt and tokenizer_config.json together; returns the number of tokens."""
    from evaluation.world.attributes import FACTORS, world_vocabulary

    words = world_vocabulary()
    merges = learn_merges(words)
    named = [word for values in FACTORS.values() for word in values]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + END for symbol in symbols), *map("".join, merges), BOS, EOS]
    assert len(set(tokens)) == len(tokens), "two merges give the same token"
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
    files = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]),
        # what prompts may say: the words that captions differ in, then the others
        "words.txt": " ".join(named) + "\n" + " ".join(word for word in words if word not in named),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    with replacing_set(folder) as place:
        for name, text in files.items():
            (place / name).write_text(text + "\n", encoding="utf-8")
    return len(tokens)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=path, default=Path("models/demo/tokenizer"), help="(models/demo/tokenizer)")
    help_length = "tokens of a prompt, both ends included (32)"
    parser.add_argument("--max_length", type=positive, default=32, help=help_length)
    parser.add_argument("--force", action="store_true", help="replace the tokenizer that is there")
    parser.run(write, None)


def write(options: argparse.Namespace) -> list[str]:
    if options.out.is_dir() and any(options.out.iterdir()) and not options.force:
        raise ValueError(f"'{options.out}' is not empty; use --force to replace the tokenizer there.")
    return [f"{write_tokenizer(options.out, options.max_length)} tokens in {options.out}"]


if __name__ == "__main__":
    main()
