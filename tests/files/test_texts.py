"""Texts, tables and names that strangers write: read whole, or refused in one sentence."""

import os
from pathlib import Path

import pytest

from ldm.cli.flags import one_line
from ldm.cli.prompts import placeholder_in, read_prompts
from ldm.files.texts import MAX_BYTES, check_file_name, file_name, read_table, read_text, slug


def test_prompts_are_lines(tmp_path: Path) -> None:
    for content, lines in {
        "\ufeffa\r\nb\rc\n\n  # d\n": ["a", "b", "c"],
        "a\x0bb\x0c\x1cc\x85d\u2028e\n": ["a\x0bb\x0c\x1cc\x85d\u2028e"],
    }.items():
        (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
        assert [entry["prompt"] for entry in read_prompts(tmp_path / "a.txt", ["prompt"], 10)] == lines


def test_other_content(tmp_path: Path) -> None:
    for content, sentence in {
        b"a\ncaf\xe9": "is not UTF-8 text .line 2.; save it as UTF-8",
        "a".encode("utf-16"): "is not UTF-8 text .line 1.",
        "a\nb".encode("utf-16-le"): "is not UTF-8 text .line 1.",
        b"a" * (MAX_BYTES + 1): "has 4 MB; a file has at most 4 MB",
    }.items():
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.txt' {sentence}"):
            read_text(tmp_path / "a.txt", "--x")


@pytest.mark.skipif(os.name != "posix", reason="mkfifo")
def test_other_places(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, sentence in {
        tmp_path / "fifo": "is a device and no file; check the path given with --x",
        tmp_path: "is a folder and no file",
        Path("/dev/zero"): "is a device",
        tmp_path / ("x" * 5000): "There is no file",
        tmp_path / "a\0b": "There is no file",
    }.items():
        for read in (lambda path: read_text(path, "--x"), lambda path: read_table(path, "--x", ["a"])):
            with pytest.raises(ValueError, match=sentence.replace("file", "(CSV )?file")):
                read(path)


def test_what_a_file_says_to_be_called(tmp_path: Path) -> None:
    file, beside = tmp_path / "a.safetensors", tmp_path / "token_identifier.txt"
    for header, placeholder in {
        b'{"__metadata__": {"placeholder": "<a>"}}': "<a>",
        b'{"<b>": {}}': "<b>",
        b'{"__metadata__": {"placeholder": 5}}': None,
        b'{"__metadata__": "x"}': None,
        b"[" * 100_000: None,
        b"[]": None,
        b"\xff": None,
    }.items():
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        assert placeholder_in(str(file)) == placeholder
    assert placeholder_in("x" * 5000) is None
    beside.write_text("<c>\n")
    assert placeholder_in(str(file)) == placeholder_in(str(tmp_path)) == "<c>"
    if os.name == "posix":
        beside.unlink()
        os.mkfifo(tmp_path / "pipe.pt")
        assert placeholder_in(str(tmp_path / "pipe.pt")) is None


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffa,b\r\n1\r\n"x\ny",2,,\r\n', encoding="utf-8", newline="")
    assert read_table(tmp_path / "a.csv", "--x", ["a"]) == [(2, {"a": "1", "b": ""}), (4, {"a": "x\ny", "b": "2"})]


def test_names() -> None:
    for name in ("a", "my-teddy_2", "größer 日本", "a.b", "console", "_"):
        check_file_name(name)
    assert file_name("../a/b\\c\x1b:*") == "-a-b-c---"
    assert file_name("..") == "image" and len(file_name("é" * 300)) == 100
    assert slug("a/b, 'c'") == "a-b-c" and slug("???") == "text"


def test_an_endless_word_in_a_message_is_cut() -> None:
    assert one_line("a\n" + "b" * 5000 + " c") == "a " + "b" * 300 + "… c"
