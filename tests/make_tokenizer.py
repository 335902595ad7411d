"""Write `tests/golden/tokenizer/`: CLIP's ids for the words of the golden prompts, read off the records.

PYTHONPATH=. python tests/make_tokenizer.py

Every byte has CLIP's id too, so that any other text is tokenised, byte by byte. The records hold only words that are
one token in CLIP. What merging makes on the way to a word gets an id that no record uses.
"""

import json
from itertools import count
from pathlib import Path

import tiny

from scripts.make_demo_tokenizer import BOS, END, EOS, byte_symbols, learn_merges

FOLDER = tiny.GOLDEN / "tokenizer"
BOS_ID, EOS_ID, FIRST_UNUSED_ID = 49406, 49407, 40000


def golden_words() -> dict[str, int]:
    """Each word of the recorded prompts and its id in CLIP's vocabulary."""
    text = tiny.golden("text")
    found: dict[str, int] = {}
    for name, record in tiny.META["prompts"].items():
        rows = [(record["prompt"], text[f"{name}.input_ids"][0])]
        if len(record["prospect_words"] or []) == 10:
            words = zip(record["prospect_words"], text[f"{name}.plain_slots"], strict=True)
            rows += [(record["prompt"].replace("*", word), row) for word, row in words if isinstance(word, str)]
        for line, ids in rows:
            for word, token in zip(line.split(), ids[1:].tolist(), strict=False):
                if token >= 0 and found.setdefault(word, token) != token:
                    raise ValueError(f"'{word}' has the ids {found[word]} and {token} in the records")
    return found


def write_tokenizer(folder: Path) -> None:
    words = golden_words()
    symbols = byte_symbols()
    vocabulary = {token: i for i, token in enumerate([*symbols, *(symbol + END for symbol in symbols)])}
    merges = learn_merges(sorted(words))
    unused = count(FIRST_UNUSED_ID)
    for token in map("".join, merges):
        word = token.removesuffix(END)
        vocabulary[token] = words[word] if token == word + END and word in words else next(unused)
    vocabulary |= {BOS: BOS_ID, EOS: EOS_ID}
    if len(set(vocabulary.values())) < len(vocabulary) or any(vocabulary[w + END] != i for w, i in words.items()):
        raise ValueError("the records do not fit CLIP's layout of ids")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    files = {
        "vocab.json": json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1])), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}, indent=2
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(FOLDER)
