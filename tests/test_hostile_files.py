"""Files made to do harm: nothing of them is run, imported, created or taken for what it claims to be.

Every payload is shown to be live: an ordinary `pickle.loads` in another process makes its marker file.
"""

from __future__ import annotations

import builtins
import codecs
import collections
import functools
import importlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import CONFIG, MODEL, ROOT, STAR
from safetensors.torch import save_file

import main
from ldm.checkpoint import CheckpointError, read_state_dict
from ldm.cli import sample as commands
from ldm.config import ConfigError, instantiate_from_config, load_config
from ldm.embeddings import EmbeddingError, load_concept
from ldm.methods.neti import NeTIMapper, NeTISettings


class Call:
    """Pickled, it is a call of `function`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def touch(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def pickled(thing: object) -> bytes:
    return pickle.dumps(thing, protocol=2)


def by_hand(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a global by any name."""
    text = argument.encode()
    call = b"c" + f"{module}\n{name}\n".encode() + b"(X" + struct.pack("<I", len(text)) + text + b"tR"
    return b"\x80\x02" + call + b"."


# name -> bytes of a pickle that makes the marker file when an ordinary unpickler reads it
PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: pickled(Call(os.system, f"touch {m}")),
    "subprocess": lambda m: pickled(Call(subprocess.check_call, ["touch", str(m)])),
    "eval": lambda m: pickled(Call(builtins.eval, touch(m))),
    "exec": lambda m: pickled(Call(builtins.exec, touch(m))),
    "open": lambda m: pickled(Call(builtins.open, str(m), "w")),
    "importlib": lambda m: pickled(Call(importlib.import_module, "evil_import")),
    "module by name": lambda m: by_hand("evil_import", "anything", "x"),
    "nested": lambda m: pickled(Call(list, Call(map, Call(functools.partial, os.system), [f"touch {m}"]))),
    "deep in lists": lambda m: pickled([1, {"a": (Call(os.mkdir, str(m)),)}]),
    "__setstate__": lambda m: (
        b"\x80\x02cevil_setter\nSetter\n)\x81X" + struct.pack("<I", len(str(m))) + str(m).encode() + b"b."
    ),
    "ordered dict of calls": lambda m: pickled(collections.OrderedDict(w=torch.ones(2), x=Call(os.mkdir, str(m)))),
    "numpy object array": lambda m: pickled(np.array([Call(os.mkdir, str(m))], dtype=object)),
    "codecs": lambda m: pickled(Call(builtins.exec, Call(codecs.decode, touch(m).encode().hex(), "hex"))),
    "protocol 0": lambda m: pickle.dumps(Call(os.system, f"touch {m}"), protocol=0),
    "protocol 5": lambda m: pickle.dumps(Call(os.mkdir, str(m)), protocol=5),
    "torch.load within": lambda m: pickled(Call(torch.storage._load_from_bytes, saved_bytes(Call(os.mkdir, str(m))))),
}


def saved_bytes(thing: object) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def zipped(code: bytes, root: str = "archive", **more: bytes) -> bytes:
    """A file of torch around a pickle; `more` are further entries of the archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{root}/data.pkl", code)
        archive.writestr(f"{root}/version", "3\n")
        archive.writestr(f"{root}/byteorder", "little")
        for name, content in more.items():
            archive.writestr(name, content)
    return stream.getvalue()


def legacy(code: bytes) -> bytes:
    """The format before torch 1.6: five pickles in a row, of which the fourth is the content."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 1001, system)))
    return head + code + pickled([])


WRAPPERS: dict[str, Callable[[bytes], bytes]] = {
    "alone": lambda code: code,
    "zip": zipped,
    "zip with a forged root": lambda code: zipped(code, ".."),
    "zip with a second pickle": lambda code: zipped(
        pickled({"w": 1}), **{"archive/more.pkl": code, "archive/../../x": b""}
    ),
    "TorchScript": lambda code: zipped(pickled({"w": 1}), **{"archive/constants.pkl": code}),
    "before 1.6": legacy,
    "in a dict": lambda code: zipped(
        b"\x80\x02}X\x0a\x00\x00\x00state_dict" + code.removeprefix(b"\x80\x02")[:-1] + b"s."
    ),
}


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in ("alone", "TorchScript")])
def test_the_wrappers_are_sound(wrapper: str, tmp_path: Path) -> None:
    """What is refused below is refused for what is inside, and not because the file around it could not be read."""
    path = tmp_path / "a.pt"
    path.write_bytes(WRAPPERS[wrapper](pickled({"a": 1})))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_state_dict(path)
    path.write_bytes(WRAPPERS[wrapper](pickled(Call(os.mkdir, str(tmp_path / "marker")))))
    with pytest.raises(
        CheckpointError, match="mkdir.*could run code|holds no tensors" if "second" in wrapper else "mkdir"
    ):
        read_state_dict(path)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What must not appear; modules that make it when they are imported lie on the path."""
    marker = tmp_path / "marker"
    modules = tmp_path / "modules"
    modules.mkdir()
    act = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    (modules / "evil_import.py").write_text(act)
    setter = "import pathlib\nclass Setter:\n    def __setstate__(self, state):\n        pathlib.Path(state).touch()\n"
    (modules / "evil_setter.py").write_text(setter)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), str(ROOT)]))
    return marker


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, marker: Path, tmp_path: Path) -> None:
    code = PICKLES[name](marker)
    path = tmp_path / "evil.ckpt"
    for wrapper, wrap in WRAPPERS.items():
        path.write_bytes(wrap(code))
        here = files_in(tmp_path)
        for read in (read_state_dict, load_concept):
            with pytest.raises((CheckpointError, EmbeddingError)) as caught:
                read(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value), wrapper
        assert files_in(tmp_path) == here, wrapper
    assert not [module for module in sys.modules if module.startswith("evil")]


LIVE = """
import contextlib, pathlib, pickle, sys
marker = pathlib.Path(sys.argv[1])
for path in sys.argv[2:]:
    with contextlib.suppress(AttributeError):  # of a module that was imported by then
        pickle.loads(pathlib.Path(path).read_bytes())
    assert marker.exists(), path
    marker.rmdir() if marker.is_dir() else marker.unlink()
    sys.modules.pop("evil_import", None)
"""


def test_the_pickles_are_live(marker: Path, tmp_path: Path) -> None:
    """Each makes its marker where an ordinary unpickler reads it."""
    for name, make in PICKLES.items():
        (tmp_path / f"{name}.pkl").write_bytes(make(marker))
    files = [str(tmp_path / f"{name}.pkl") for name in PICKLES]
    done = subprocess.run([sys.executable, "-c", LIVE, str(marker), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_under_the_names_of_modules_becomes_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of modules are let in, so that real and importable functions hide behind some of them here."""
    marker = tmp_path / "marker"
    evil = types.ModuleType("ldm.evil")
    evil.touch = lambda *args: marker.touch()
    monkeypatch.setitem(sys.modules, "ldm.evil", evil)
    importlib.import_module("ldm.evil").touch()
    assert marker.exists()
    marker.unlink()
    argument = b"X" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode()
    for name in (b"ldm.evil\ntouch", b"ldm.util\nos.system", b"torch.nn.modules.module\ntorch.os.system"):
        called = b"c" + name + b"\n(" + argument + b"tR"
        for code in (
            called,  # the call alone
            b"}X\x09\x00\x00\x00attention" + called + b"s",  # as the generator
            b"}X\x0f\x00\x00\x00string_to_param" + called + b"s",
            b"c" + name + b"\n)\x81" + called + b"b",  # as the state of a module
        ):
            (tmp_path / "e.pt").write_bytes(zipped(b"\x80\x02" + code + b"."))
            for read in (read_state_dict, load_concept):
                with pytest.raises(ValueError, match=r"e\.pt'") as caught:
                    read(tmp_path / "e.pt")
                assert "damaged" not in str(caught.value), "the pickle is sound, so something else must refuse it"
    assert not marker.exists()


def test_the_commands_refuse_them_too(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "evil.ckpt", tmp_path / "out"
    path.write_bytes(zipped(PICKLES["os.system"](marker)))
    learn = ["-t", "--base", str(CONFIG), "--data_root", str(STAR), "-l", str(out), "--max_steps", "1"]
    calls = [
        lambda: sys.exit(main.main([*learn, "--actual_resume", str(path)])),
        lambda: sys.exit(main.main([*learn, "--actual_resume", str(MODEL), "--embedding_manager_ckpt", str(path)])),
        lambda: commands.run(["--prompt", "*", "--concept", str(path), "--outdir", str(out)]),
        lambda: commands.run(["--prompt", "*", "--ckpt", str(path), "--outdir", str(out)]),
    ]
    for call in calls:
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == 2 and "system" in capsys.readouterr().err
    assert not marker.exists() and not out.exists()


def test_a_run_with_a_hostile_checkpoint_is_not_resumed(
    marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/configs").mkdir()
    shutil.copy(CONFIG, tmp_path / "run/configs/x-project.yaml")
    (tmp_path / "run/checkpoints/last.ckpt").write_bytes(zipped(PICKLES["eval"](marker)))
    assert main.main(["-r", str(tmp_path / "run"), "-t"]) == 2
    assert "eval" in capsys.readouterr().err and not marker.exists()


# Sizes that are not true


BIG = b"\x80\x02cbuiltins\nbytearray\n(\x8a\x07" + (2**50).to_bytes(7, "little") + b"tR."
SIZES: dict[str, bytes] = {
    "more than the storage": saved_bytes({"w": torch.ones(4)}).replace(b"K\x04\x85", b"K\x7f\x85"),
    "a petabyte of nothing": zipped(BIG),
    "a petabyte before 1.6": legacy(BIG),
    "deep": zipped(b"\x80\x02" + b"}K\x00" * 50_000 + b"N" + b"s" * 50_000 + b"."),
    "a string of 4 GB": zipped(b"\x80\x02X\xff\xff\xff\xffabc."),
    "memo of 2^32": zipped(b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xfe."),
}


def header(entries: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {  # of safetensors files; which other lies there are is the library's matter
    "offsets past the end": header({"w": entry([8], [0, 32])}),
    "overlapping": header({"a": entry([4], [0, 16]), "b": entry([4], [0, 16])}),
    "shape that overflows": header({"w": entry([2**62, 4], [0, 16])}),
    "length 2^60": header({"w": entry([4], [0, 16])}, length=2**60),
    "unknown type": header({"w": entry([4], [0, 16], dtype="OBJECT")}),
    "deep": header(b'{"a":' * 5000),
    "metadata of lists": header({"__metadata__": {"a": [1]}, "w": entry([4], [0, 16])}),
}


@pytest.mark.parametrize("content", [*SIZES.values(), *HEADERS.values()], ids=[*SIZES, *HEADERS])
def test_sizes_that_are_not_true(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(content)
    for read in (read_state_dict, load_concept):
        with pytest.raises((CheckpointError, EmbeddingError)) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


# Configurations


TARGETS = [  # more in tests/test_config.py
    "os.system",
    "builtins.exec",
    "evil_import.Anything",
    "ldm.config.importlib.import_module",
    "torch.nn.modules.linear.torch.load",
    "..os.system",
    "",
    ["os.system"],
]


@pytest.mark.parametrize("key", ["target", "_target_", "__target__", "class_path"])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: object, key: str, marker: Path) -> None:
    config = {key: target, "params": {"command": f"touch {marker}", "args": ["touch", str(marker)]}}
    with pytest.raises(ConfigError, match="outside the packages|cannot be imported|is missing"):
        instantiate_from_config(config)
    assert not marker.exists() and "evil_import" not in sys.modules


@pytest.mark.parametrize("place", ["model", "lightning.callbacks.x", "data.params.train", "allowing"])
def test_a_configuration_cannot_run_or_allow_anything(place: str, marker: Path, tmp_path: Path) -> None:
    evil = tmp_path / "evil.yaml"
    node: dict[str, object] = {"target": "subprocess.Popen", "params": {"args": ["touch", str(marker)]}}
    for key in reversed(place.replace("allowing", "model").split(".")):
        node = {key: node}
    evil.write_text(json.dumps(node | ({"allow_targets": ["subprocess"]} if place == "allowing" else {})))
    flags = ["-t", "--base", str(CONFIG), str(evil), "--actual_resume", str(MODEL), "--data_root", str(STAR)]
    assert main.main([*flags, "-l", str(tmp_path / "logs")]) == 2
    assert not marker.exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:os", "!x"]
)
def test_tags_of_yaml_are_refused(tag: str, marker: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {tag} ['{marker}']\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "a.yaml")
    assert not marker.exists()


# Descriptions that do not fit their tensors

MAPPER, MAPPED = NeTIMapper(NeTISettings(num_layers=7, width=128)).to_concept()
PREFIX = {"prefix": torch.zeros(1, 2, 1, 4, 32)}
LATENTS = {"contexts": torch.zeros(2, 77, 8), "x_T": torch.zeros(1, 4, 2, 2), "z_0": torch.zeros(1, 4, 2, 2)}


def mapper_with(**settings: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    said = json.loads(MAPPED["neti.settings"]) | settings
    return MAPPER, {"prospect.method": "neti", "neti.settings": json.dumps(said)}


DESCRIBED = {
    "endless layers": (*mapper_with(num_layers=10**12), "num_layers must be in 1..1000"),
    "endless width": (*mapper_with(width=10**12), "width must be in 1..65536"),
    "layers as text": (*mapper_with(num_layers="7"), "num_layers must be a whole number, not '7'"),
    "no finite norm": (*mapper_with(target_norm=math.nan), "target_norm must be in 0..1000000.0, not nan"),
    "deep settings": (MAPPER, {"prospect.method": "neti", "neti.settings": "[" * 100_000}, "its mapper cannot be read"),
    "a logit bias": (
        PREFIX,
        {"prospect.method": "catversion", "catversion.text_layers": "1", "catversion.logit_bias": "nan"},
        "does not say its text layers and logit bias",
    ),
    "timesteps": (
        LATENTS,
        {"prospect.method": "null-text", "inversion.timesteps": "1,2"},
        "do not go down to the image",
    ),
    "a class that is no method": (
        PREFIX,
        {"prospect.method": "ldm.methods.neti.NeTIMapper"},
        "'ldm.methods.neti.NeTIMapper' is no method",
    ),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_descriptions_that_do_not_fit(name: str, tmp_path: Path) -> None:
    tensors, metadata, sentence = DESCRIBED[name]
    save_file(tensors, tmp_path / "a.safetensors", {"prospect.version": "1"} | metadata)
    with pytest.raises(EmbeddingError, match=f"a.safetensors': .*{sentence}") as caught:
        load_concept(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Names that are paths


def test_names_do_not_lead_out_of_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inner := tmp_path / "a/b/c").mkdir(parents=True)
    concept = inner / "x.safetensors"
    save_file({"*": torch.ones(10, 128)}, concept, {"prospect.num_stages": "10"})
    before = files_in(tmp_path)
    small = ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu", "--outdir", str(inner / "out")]
    paths = commands.run([*small, "--concept", f"../../x={concept}", "--prompt", "../../x in ../../../y/z"])
    paths += commands.run([*small, "--prompt", "/etc/passwd\x00../..\\..\\x"])
    assert all(path.parent == inner / "out" and ".." not in path.name for path in paths)
    assert files_in(tmp_path) - before == {inner / "out", *paths}
    before = files_in(tmp_path)
    learn = ["--base", str(CONFIG), "--actual_resume", str(MODEL), "--data_root", str(STAR), "-l", str(inner)]
    for flags in (["-n", "../../x"], ["-n", "/x"], ["-n", "..\\x"], ["-f", "/../../x"]):
        assert main.main([*learn, *flags]) == 2
        assert "must be a name, not a path" in capsys.readouterr().err
    run = [*learn, "-t", "--placeholder_tokens", "../../x", "--max_steps", "1", "--enable_progress_bar", "false"]
    assert main.main(run) == 0
    (made,) = [path for path in inner.iterdir() if path not in before]
    assert files_in(tmp_path) - before == {made, *files_in(made)}


def test_what_a_message_quotes_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.safetensors"
    save_file({"\x1b[2J\x1b]0;owned\x07": torch.ones(1, 128), "\n\r<b>": torch.ones(1, 128)}, path)
    with pytest.raises(SystemExit):
        commands.run(["--prompt", "*", "--concept", str(path)])
    err = capsys.readouterr().err
    assert err.endswith("\n") and err[:-1].isprintable() and "\\x1b[2J" in err
