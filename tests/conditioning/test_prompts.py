"""Prompts and `prospect_words`: the contract for everything a user may pass."""

import logging
from collections.abc import Iterable
from pathlib import Path

import make_tokenizer
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from ldm.conditioning.prompts import PromptReader

BOS, EOS, STAR = 49406, 49407, 265
A, DOG, CAT, ON, THE, TABLE, OF = 320, 1929, 2368, 525, 518, 2175, 539


def single(rows: Iterable[int]) -> list[list[int]]:
    """One learned token in each stage."""
    return [[row] for row in rows]


def body(reader: PromptReader, prompt: str, words: list | None = None, stage: int = 0) -> list[int]:
    """The slots between the start and the end mark; the padding is checked to be all end marks."""
    row = reader.read([prompt], words)[stage, 0].tolist()
    end = row.index(EOS)
    assert len(row) == 77 and row[0] == BOS and set(row[end:]) == {EOS}
    return row[1:end]


def test_the_tokenizer_in_the_repository_is_the_one_the_script_writes(tmp_path: Path) -> None:
    make_tokenizer.write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text(encoding="utf-8") == (tiny.TOKENIZER / file.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_short_list_is_refused_where_the_reference_ignored_it(reader: PromptReader, legacy: bool) -> None:
    """All that is refused is in test_request.py."""
    prompt = tiny.META["prompts"]["short_list"]
    with pytest.raises(ValueError, match="9 entries, but this model has 10 stages"):
        reader.read([prompt["prompt"]], prompt["prospect_words"], legacy)
    with pytest.raises(ValueError, match="A prompt must be a text, not a list"):
        reader.read([["*"]], legacy_word_tokens=legacy)


# What the reference's rule does with other text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("a xyz", [A, 87]),  # the first piece of each word only
        ("a  dog", [A, EOS, DOG]),  # an empty word is the end mark
        ("", [EOS]),
        ("dog\tcat", [DOG]),  # only spaces part words
        ("*, dog", [9, DOG]),  # not a star by itself
        ("* *", [-4, -4]),
    ],
)
def test_the_legacy_rule_splits_at_spaces(reader: PromptReader, entry: str, expected: list[int]) -> None:
    words = [None] * 3 + [entry] + [None] * 6
    row = reader.read(["a * on"], words, legacy_word_tokens=True)[3, 0].tolist()
    assert row[: len(expected) + 4] == [BOS, A, *expected, ON, EOS]
    assert len(row) == 77


def test_the_legacy_rule_at_its_ends(
    reader: PromptReader, tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A long prompt loses its end mark; without a learned star it is read as a character."""
    slots = reader.read(["* dog"], ["a " * 90] * 10, legacy_word_tokens=True)
    assert slots.shape == (10, 1, 77) and EOS not in slots[0, 0, :76].tolist()[1:] and slots[0, 0, -1] == A
    row = PromptReader(tokenizer, {}, 10).read(["a *"], legacy_word_tokens=True)[0, 0].tolist()
    assert row[:4] == [BOS, A, STAR, EOS] and "Nothing is learned or loaded for '*'" in caplog.text


# prospect_words: what is taken


def test_each_kind_of_entry(reader: PromptReader) -> None:
    words = ["dog", "a * dog", 9, np.int64(8), None, "*", 0, "* and *", "", "dog"]
    read = [[DOG], [A, -2, DOG], [-10], [-9], [-5], [-6], [-1], [-8, 537, -8], [], [DOG]]
    assert [body(reader, "a * on", words, stage) for stage in range(10)] == [[A, *own, ON] for own in read]


def test_an_integer_is_the_learned_vector_of_that_stage_in_any_order(reader: PromptReader) -> None:
    slots = reader.read(["* and a *", ""], list(range(9, -1, -1)))
    assert set(slots[:, 1, 1:].flatten().tolist()) == {EOS}
    assert slots[:, 0, 1].tolist() == slots[:, 0, 4].tolist() == [-10, -9, -8, -7, -6, -5, -4, -3, -2, -1]


def test_other_numbers_of_stages_and_lengths(tokenizer: CLIPTokenizer) -> None:
    reader = PromptReader(tokenizer, {"*": single([4, 2, 0])}, 3, max_length=8)
    slots = reader.read(["a *"], [2, None, "dog *"])
    assert slots[:, 0].tolist() == [
        [BOS, A, -1, EOS, EOS, EOS, EOS, EOS],
        [BOS, A, -3, EOS, EOS, EOS, EOS, EOS],
        [BOS, A, DOG, -1, EOS, EOS, EOS, EOS],
    ]


# Text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("*, dog", [-1, 267, DOG]),
        ("(*)", [263, -1, 264]),
        ("a *'s dog", [A, -1, 6, 338, DOG]),
        ("a *.", [A, -1, 269]),
        ("dog*cat", [DOG, -1, CAT]),
        ("**", [-1, -1]),
        ("*\n*", [-1, -1]),
    ],
)
def test_a_star_beside_anything_is_a_placeholder(reader: PromptReader, prompt: str, expected: list[int]) -> None:
    assert body(reader, prompt) == expected
    assert body(reader, "*", [prompt] * 10) == expected, "and in an entry"


@pytest.mark.parametrize("prompt", ["a  dog", " a dog ", "a\tdog", "A Dog", "a \t\n  DOG"])
def test_white_space_and_case_do_not_matter(reader: PromptReader, prompt: str) -> None:
    assert body(reader, prompt) == body(reader, "*", [prompt] * 10) == [A, DOG]


def test_a_word_that_is_several_tokens_is_kept_whole(reader: PromptReader, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("photorealistic", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert body(reader, "a * dog", ["photorealistic"] * 10) == [A, *ids, DOG]


def test_an_emoji_is_its_bytes(reader: PromptReader) -> None:
    smile = [172, 253, 247, 480]  # F0 9F 99 82 in CLIP's order of bytes, the last one ending a word
    assert body(reader, "a 🙂* dog") == [A, *smile, -1, DOG]
    assert body(reader, "") == body(reader, "   ") == []


# Several placeholders


def test_several_placeholders_are_all_replaced(tokenizer: CLIPTokenizer) -> None:
    rows = {"*": single(range(10)), "<cat>": single(range(10, 20)), "<cat>-2": single([20] * 10)}
    reader = PromptReader(tokenizer, rows, 10)
    assert body(reader, "a * on <cat> on <cat>-2", stage=3) == [A, -4, ON, -14, ON, -21], "the longest name counts"
    assert body(reader, "*", ["<cat> on *"] * 10, stage=3) == [-14, ON, -4]
    assert body(reader, "* on <cat>", [7] * 10, stage=2) == [-8, ON, -13], "an entry speaks of the star only"


def test_a_placeholder_that_is_a_word_stays_out_of_other_words(tokenizer: CLIPTokenizer) -> None:
    reader = PromptReader(tokenizer, {"dog": single(range(10)), "(.)+": single(range(10, 20))}, 10)
    assert body(reader, "a dog, dog's (.)+") == [A, -1, 267, -1, 6, 338, -11]
    for text in ("dogs", "hotdog", "a hotdog on"):
        assert body(reader, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert body(reader, "*", ["a dog on"] * 10) == [A, -1, ON]


# Warnings


def test_more_than_75_tokens_keep_the_end_mark_and_quote_what_was_cut(
    reader: PromptReader, caplog: pytest.LogCaptureFixture
) -> None:
    full = reader.read(["a " * 75])[0, 0].tolist()
    assert full == [BOS] + [A] * 75 + [EOS] and caplog.text == ""
    long = reader.read(["a " * 75 + "dog on the table *"])[0, 0].tolist()
    assert long == full
    assert "longer than 75 tokens" in caplog.text and "'dog on the table" in caplog.text
    assert len(caplog.records) == 1, "once, and not for every stage"


def test_a_long_entry_is_cut_in_its_stage_only(reader: PromptReader, caplog: pytest.LogCaptureFixture) -> None:
    slots = reader.read(["* dog *"], ["a " * 80] + ["cat"] * 9)
    assert slots[0, 0].tolist() == [BOS] + [A] * 75 + [EOS]
    assert slots[1, 0, :5].tolist() == [BOS, CAT, DOG, CAT, EOS]
    assert "a a a a a dog" in caplog.text
    caplog.clear()
    reader.read(["a " * 75 + "dog *"])
    assert "'dog *'" in caplog.text, "a placeholder that is cut off is named"


def test_words_without_a_star_in_the_prompt(reader: PromptReader, caplog: pytest.LogCaptureFixture) -> None:
    slots = reader.read(["a dog"], ["cat"] * 10)
    assert slots[:, 0, :4].tolist() == [[BOS, A, DOG, EOS]] * 10
    assert "prospect_words has no effect: the prompt 'a dog' has no '*'" in caplog.text


def test_a_star_that_nothing_is_learned_for(tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    reader = PromptReader(tokenizer, {}, 10)
    assert body(reader, "a * dog") == [A, STAR, DOG]
    assert caplog.messages == ["Nothing is learned or loaded for '*', so it is read as an ordinary character."]
    caplog.clear()
    assert body(reader, "a * dog", ["cat"] * 10) == [A, CAT, DOG]
    assert caplog.messages == [], "no star is left"


def test_weights_of_other_programs_are_read_as_letters_and_said(
    reader: PromptReader, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = ("(red:1.4)", "(big red: 2)", "<lora:style:0.8>", "<LoRA:style>")
    for found in foreign:
        assert len(body(reader, f"a {found} dog")) > 4
        body(reader, "*", [f"a {found} dog"] * 10)
    sentence = "'{}' is read as letters: weights and extra networks of other programs mean nothing here."
    assert caplog.messages == [sentence.format(found) for found in foreign for _ in range(2)]
    caplog.clear()
    body(reader, "at (12:30), (see: no), (red) a:1.4 <style> (" + "a" * 20_000)
    assert not any("read as letters" in message for message in caplog.messages)


def test_words_for_which_there_is_room(reader: PromptReader) -> None:
    assert reader.words_read("a " * 75) == [None] * 10
    words = ["a " * 80, "cat", *[None] * 8]
    assert reader.words_read("a * dog", words) == [75, *[None] * 9]
    assert reader.words_read("a " * 74 + "photorealistic dog") == [74] * 10, "a word that does not fit whole"


def test_ordinary_use_is_silent(reader: PromptReader, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reader.read(["a photo of a *", "*"], ["a * dog"] * 5 + [None] * 5)
    reader.read([""])
    assert caplog.messages == []


# Any text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("* \t<>")), max_size=40)
ENTRIES = st.none() | st.integers(0, 3) | TEXTS


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, words=st.none() | st.lists(ENTRIES, min_size=4, max_size=4))
def test_any_text_gives_a_well_formed_row(tokenizer: CLIPTokenizer, prompt: str, words: list | None) -> None:
    reader = PromptReader(tokenizer, {"*": single([3, 2, 1, 0])}, 4)
    slots = reader.read([prompt], words)
    assert slots.shape == (4, 1, 77)
    for stage, row in enumerate(slots[:, 0].tolist()):
        assert row[0] == BOS and row[-1] == EOS
        assert all(-4 <= slot <= EOS for slot in row)
        entry = words[stage] if words is not None else None
        stars = prompt.count("*") * (entry.count("*") if isinstance(entry, str) else 1)
        learned = [slot for slot in row if slot < 0]
        assert len(learned) == stars or row[75] != EOS, "none is lost unless the row is full"
        stage_read = stage if entry is None or isinstance(entry, str) else entry
        assert set(learned) <= {-(3 - stage_read + 1)}
