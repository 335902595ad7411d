"""Files are written whole or not at all, sets of files together, and only what is ours is ever removed."""

import os
from pathlib import Path

import pytest

from ldm.files import writing
from ldm.files.writing import (
    WriteError,
    check_new_file,
    remove_unfinished,
    replace_text,
    replacing,
    replacing_set,
)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_what_was_replaced_is_kept_or_gone(tmp_path: Path) -> None:
    path, older = tmp_path / "new/a", tmp_path / "new/b"  # whose folder is made
    for text in ("1", "2", "3"):
        with replacing(path, keep=older) as temporary:
            temporary.write_text(text)
    assert content(tmp_path / "new") == {"a": "3", "b": "2"}
    with pytest.raises(RuntimeError), replacing(path, keep=older) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert content(tmp_path / "new") == {"a": "3", "b": "2"}


def test_after_a_kill_both_names_are_of_one_file(tmp_path: Path) -> None:
    """The kill came between the two renames; a rename of one link over another to the same file does nothing."""
    write(tmp_path, last="1")
    os.link(tmp_path / "last", tmp_path / "previous")
    with replacing(tmp_path / "last", keep=tmp_path / "previous") as temporary:
        temporary.write_text("2")
    assert content(tmp_path) == {"last": "2", "previous": "1"}


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path, original="kept")
    (tmp_path / "link").symlink_to(tmp_path / "original")
    replace_text(tmp_path / "link", "new")
    assert content(tmp_path) == {"link": "new", "original": "kept"}


def test_a_file_that_another_program_has_open_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="old")
    refusals, replace = [2], os.replace

    def held(path: Path, target: Path) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(13, "Permission denied", str(path))
        replace(path, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(writing, "_WAITS", (0.0, 0.0))
    replace_text(tmp_path / "a", "new")
    refusals[0] = 9
    with pytest.raises(WriteError, match="another program has it open; close it there"):
        replace_text(tmp_path / "a", "newer")
    assert content(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("there", [False, True])
def test_a_set_is_moved_as_a_whole(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "new" / "set"
    if there:
        folder.mkdir(parents=True)
        write(folder, a="old", mine="kept")
    with replacing_set(folder) as staging:
        write(staging, a="1")
        (staging / "sub").mkdir()
        write(staging / "sub", b="2")
        assert not folder.exists() or (folder / "a").read_text() == "old"
    assert content(tmp_path) == {
        f"new/set/{name}": text
        for name, text in {"a": "1", "sub/b": "2", **({"mine": "kept"} if there else {})}.items()
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("there", [False, True])
def test_a_set_that_fails_changes_nothing(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "set"
    if there:
        folder.mkdir()
        write(folder, a="old")
        (folder / "b").mkdir()
    before = content(tmp_path)
    with pytest.raises(RuntimeError), replacing_set(folder) as staging:
        write(staging, a="new")
        raise RuntimeError
    assert content(tmp_path) == before and folder.exists() == there
    if there:
        with pytest.raises(WriteError, match="b': it is a folder"), replacing_set(folder) as staging:
            write(staging, a="new", b="new")
        assert content(tmp_path) == before
        assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_only_unfinished_files_of_ours_are_removed(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, outside):
        folder.mkdir()
        write(folder, **{".prospect-12-0123abcd.partial": "half", ".tmp-1-2-last.ckpt": "a stranger's"})
    (run / ".prospect-7-89abcdef.partial").mkdir()
    write(run / ".prospect-7-89abcdef.partial", inner="half")
    (run / "images").symlink_to(outside)
    (run / ".prospect-8-89abcdef.partial").symlink_to(outside)
    kept = content(outside)
    remove_unfinished(run)
    assert sorted(os.listdir(run)) == [".prospect-8-89abcdef.partial", ".tmp-1-2-last.ckpt", "images"]
    remove_unfinished(run / "images")
    assert content(outside) == kept


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("new.ckpt", "must end in .safetensors"),
        ("folder.safetensors", "is a folder; name another file"),
        ("old.safetensors", "is there already; use --force"),
        ("source.safetensors", "is, or is part of, what is read"),
        ("link.safetensors", "is, or is part of, what is read"),
        ("model/unet.safetensors", "is, or is part of, what is read"),
        ("run/checkpoints/a.safetensors", "folder of a training run"),
    ],
)
def test_files_that_are_not_written(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "run/configs").mkdir(parents=True)
    write(tmp_path, **{"old.safetensors": "", "source.safetensors": "", "run/configs/x-project.yaml": ""})
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "source.safetensors")
    inputs = [tmp_path / "source.safetensors", tmp_path / "model"]
    for force in (False, True):
        if force and "--force" in words:
            monkeypatch.setenv("HOME", str(tmp_path))
            assert check_new_file(f"~/{name}", force, inputs) == tmp_path / name
            continue
        with pytest.raises(ValueError, match=words):
            check_new_file(tmp_path / name, force, inputs)
