"""Any bytes and any text: the readers end in what they promise or in their documented errors, and in nothing else."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.checkpoint import CheckpointError, read_state_dict
from ldm.cli.prompts import read_prompts
from ldm.cli.sample import build_parser, build_requests
from ldm.conditioning.presets import PRESET_STAGES, load_presets, preset
from ldm.conditioning.prompts import PromptReader
from ldm.embeddings import EmbeddingError, load_concept
from ldm.files.records import read_parameters, save_png
from ldm.request import ModelFacts, Request

ROOT = Path(__file__).parents[1]
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "models/demo/tokenizer", local_files_only=True)


# Prompts

ANY_TEXT = st.text(st.characters(), max_size=30) | st.text("*<> ,.\t\x00\x1b\u202e🌟é", max_size=30)
ANY_ENTRY = (
    st.none() | ANY_TEXT | st.integers() | st.booleans() | st.floats() | st.binary(max_size=5) | st.lists(st.none())
)
ANY_WORDS = (
    ANY_ENTRY
    | st.lists(ANY_ENTRY, max_size=6)
    | st.lists(st.none() | ANY_TEXT | st.integers(0, 3), min_size=4, max_size=4)
)


@FUZZ
@given(
    prompt=ANY_TEXT | ANY_ENTRY,
    words=ANY_WORDS,
    legacy=st.booleans(),
    names=st.lists(ANY_TEXT.filter(bool), max_size=3),
)
def test_prompts(tokenizer: CLIPTokenizer, prompt: object, words: object, legacy: bool, names: list[str]) -> None:
    rows = {name: [[4 * i + s] for s in range(4)] for i, name in enumerate(dict.fromkeys(names))}
    reader = PromptReader(tokenizer, rows, num_stages=4, max_length=32)
    try:
        slots = reader.read([prompt], words, legacy)
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(("A prompt", "prospect_words"))
        return
    assert slots.shape == (4, 1, 32) and slots.dtype == torch.long
    assert slots.min() >= -4 * len(rows) and slots.max() < len(tokenizer)
    assert (slots[:, 0, 0] == tokenizer.bos_token_id).all()


@FUZZ
@given(attribute=st.sampled_from([*PRESET_STAGES, "mood"]), prompt=ANY_TEXT, stages=st.integers(1, 40))
def test_presets(attribute: str, prompt: str, stages: int) -> None:
    try:
        words = preset(attribute, prompt, num_stages=stages)
    except ValueError:
        tenths = {int((stage + 0.5) * 10 / stages) for stage in range(stages)}
        assert attribute == "mood" or not tenths & set(PRESET_STAGES[attribute])
        return
    assert len(words) == stages and all(isinstance(word, str) for word in words)


# Requests: what a YAML file, a record or Python can give

ANY_VALUE = ANY_ENTRY | st.dictionaries(ANY_TEXT, ANY_ENTRY, max_size=2) | st.integers(-(10**30), 10**30)
ANY_VALUE |= st.sampled_from(["ddim", "plms", "crop", "style", 10**4000, float("nan"), b"a.png", Path("~/a.png")])
FIELDS = st.sampled_from([field.name for field in fields(Request)])
ANY_RECORD = st.dictionaries(FIELDS | ANY_TEXT, ANY_VALUE, max_size=4)


@FUZZ
@given(values=st.dictionaries(FIELDS, ANY_VALUE, max_size=3))
def test_requests(values: dict[str, object]) -> None:
    try:
        request = Request(**values).for_model(ModelFacts(num_stages=4))
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    assert 1 <= request.ddim_steps <= 1000 and 0 <= request.guidance_scale <= 1000 and min(request.size) >= 64


TAGS = st.sampled_from(["bool", "timestamp", "int", "float", "binary", "null", "set", "omap"])
WORDS = ["1", "-1", "1e400", "~", "yes", "'*'", "*", "a", "prompt", "seed", "layout", "[0]", "0o17", "2020-13-45"]
YAML = st.recursive(
    st.sampled_from(WORDS) | st.builds("!!{} {}".format, TAGS, ANY_TEXT),
    lambda inner: (
        st.builds("[{}]".format, st.lists(inner, max_size=4).map(", ".join))
        | st.builds("{{{}}}".format, st.lists(st.builds("{}: {}".format, inner, inner), max_size=3).map(", ".join))
    ),
    max_leaves=8,
)


@FUZZ
@given(text=YAML | ANY_TEXT | st.binary(max_size=60))
def test_yaml_files_of_words_and_presets(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for read, kind in ((lambda path: read_prompts(path, ["prompt", "seed"], 10), list), (load_presets, dict)):
        try:
            assert isinstance(read(path), kind)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@FUZZ
@given(
    record=st.dictionaries(FIELDS | ANY_TEXT, ANY_VALUE, max_size=4).map(lambda r: json.dumps(r, default=str))
    | ANY_TEXT
)
def test_records_of_images(tmp_path: Path, record: str) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prospect": record})
    options = build_parser("", editing=True).parse_args(["--from", str(tmp_path / "a.png")])
    try:
        (request,) = build_requests(options, read_parameters(tmp_path / "a.png"), ModelFacts())
        assert isinstance(request, Request)
    except ValueError as error:
        assert "\n" not in str(error)


# Files

VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
METADATA = {"format": "pt", "prospect.version": "1", "prospect.num_stages": "3"}


def torch_bytes(content: object, path: Path, legacy: bool) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Good files of every kind, to be damaged."""
    path = tmp_path_factory.mktemp("seeds") / "file"
    contents = {"string_to_param": {"*": VECTORS[:1]}}, {"state_dict": {"w": VECTORS}, "step": 3}, {"*": VECTORS[0]}
    files = [torch_bytes(content, path, legacy) for content in contents for legacy in (False, True)]
    return [*files, save({"*": VECTORS}, METADATA), save({"a": VECTORS, "b": VECTORS.half()})]


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "remove", "repeat"]),
        st.floats(0, 0.999),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=5,
)


def damaged(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in edits:
        place = int(where * len(content))
        before, after = content[:place], content[place:]
        content = {
            "set": before + new + after[len(new) :],
            "cut": before,
            "insert": before + new + after,
            "remove": before + after[len(new) :],
            "repeat": before + after[:40] + after,
        }[kind]
    return content


def read_all(path: Path) -> None:
    """Both readers, which may succeed or fail as documented."""
    try:
        assert all(isinstance(x, Tensor) for x in read_state_dict(path).values())
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    try:
        vectors = load_concept(path).vectors
        assert vectors.ndim == 2 and vectors.dtype == torch.float32 and vectors.isfinite().all()
    except EmbeddingError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@FUZZ
@given(number=st.integers(0, 7), edits=EDITS)
def test_damaged_files(tmp_path: Path, seeds: list[bytes], number: int, edits: list[tuple[str, float, bytes]]) -> None:
    path = tmp_path / "file"
    path.write_bytes(damaged(seeds[number], edits))
    read_all(path)


@FUZZ
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"\0" * 8 + b"{"]),
)
def test_any_bytes(tmp_path: Path, content: bytes, head: bytes) -> None:
    (tmp_path / "file").write_bytes(head + content)
    read_all(tmp_path / "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
OFFSETS = st.lists(st.integers(-(2**64), 2**64) | st.integers(0, 64), min_size=2, max_size=2)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "U8", "BOOL", "F8_E4M3", "OBJECT"]),
        "shape": st.lists(st.integers(-1, 2**64) | st.integers(0, 8), max_size=4),
        "data_offsets": OFFSETS,
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRY | JSON, max_size=4),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_safetensors_headers(tmp_path: Path, header: dict, length: int | None, data: bytes) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    read_all(tmp_path / "file")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=10,
)
NAMES = st.sampled_from(
    ["attention", "initial_embeddings", "string_to_param", "state_dict", "*", "clip_l", "_parameters"]
)
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)


@FUZZ
@given(
    content=PLAIN | st.dictionaries(NAMES, PLAIN | TENSORS | st.dictionaries(NAMES, TENSORS)), kind=st.integers(0, 2)
)
def test_torch_files_of_anything(tmp_path: Path, content: object, kind: int) -> None:
    path = tmp_path / "file"
    if kind == 2:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 0)
    read_all(path)
