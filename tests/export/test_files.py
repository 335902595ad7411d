"""Exported concepts: the files, what stands in them, what is refused; `scripts/export_embedding.py`."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from ldm.cli.export import run
from ldm.conditioning.prompts import PromptReader
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.export.files import PROGRAMS, Export, Use
from ldm.export.texts import check_name, stage_texts

ROOT = Path(__file__).parents[2]
DESCRIPTION = "Export.\n"


@pytest.fixture
def concept() -> Concept:
    metadata = {"init_word": "teddy", "step": "600", "base_model": "sd-v1-4.ckpt", "base_model_sha256": "ab" * 32}
    return Concept(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), metadata)


@pytest.fixture
def file(concept: Concept, tmp_path: Path) -> Path:
    save_concept(concept, tmp_path / "teddy.safetensors", "<teddy>")
    return tmp_path / "teddy.safetensors"


def test_a_file_for_each_stage_with_one_vector(file: Path, concept: Concept, tmp_path: Path) -> None:
    paths = run(DESCRIPTION, [str(file), "--name", "teddy", "--outdir", str(tmp_path / "out")])
    assert [path.name for path in paths] == [f"teddy-{stage}.safetensors" for stage in range(10)]
    for stage, path in enumerate(paths):
        with safe_open(path, "pt") as opened:
            assert opened.keys() == [f"teddy-{stage}"]  # what every program takes for a textual inversion of one token
            vector = opened.get_tensor(f"teddy-{stage}")
        assert vector.dtype == torch.float32 and torch.equal(vector, concept.vectors[stage])


def test_export_and_import_lose_nothing(file: Path, tmp_path: Path) -> None:
    original = load_concept(file)
    paths = run(DESCRIPTION, [str(file), "--name", "a_b-c", "--outdir", str(tmp_path / "out")])
    sources = [tmp_path / "out", paths, paths[::-1], *paths]
    for source in sources:
        again = load_concept(source)
        assert torch.equal(again.vectors, original.vectors)
        assert again.metadata == original.metadata


def test_more_than_ten_stages_come_back_in_order(tmp_path: Path) -> None:
    save_concept(Concept(torch.arange(24.0).view(12, 2)), tmp_path / "c.safetensors")
    run(DESCRIPTION, [str(tmp_path / "c.safetensors"), "--name", "c", "--outdir", str(tmp_path / "out")])
    for source in (tmp_path / "out", sorted((tmp_path / "out").iterdir()), tmp_path / "out" / "c-7.safetensors"):
        assert torch.equal(load_concept(source).vectors, torch.arange(24.0).view(12, 2))


# Prompts


def test_texts_say_what_our_own_reader_reads(concept: Concept) -> None:
    """The slots of our prompts are those of the exported texts, when names are looked up in them as tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/demo/tokenizer")
    other = Concept(torch.zeros(4, 16))
    concepts = {"*": ("star", concept), "<b>": ("b", other)}
    rows = {"*": concept.rows_for(10), "<b>": [10 + row for row in other.rows_for(10)]}
    words = ["a * on*,<b><b>", 3, None, 0, "", "* *", "a <b>'s *", "(x) [y]: z|*", "   a   heart ", "*"]
    reader = PromptReader(tokenizer, rows, 10, 32)
    for prompt in ("*", "two * and <b> , *!", "a <b> heart"):
        texts = Export(concepts, Use(prompt, words))._texts()
        tokens = {f"star-{k}": -(k + 1) for k in range(10)} | {f"b-{k}": -(11 + k) for k in range(4)}
        for stage, slots in enumerate(reader.read([prompt], words)[:, 0].tolist()):
            found = []
            for word in texts[stage].split(" "):
                found += [tokens[word]] if word in tokens else tokenizer(word, add_special_tokens=False)["input_ids"]
            assert slots[1 : len(found) + 1] == found and set(slots[len(found) + 1 :]) == {tokenizer.eos_token_id}


def test_without_words_every_stage_has_its_own_token() -> None:
    assert stage_texts("a * dog", None, 3, {"*": "t"}) == ["a t-0 dog", "a t-1 dog", "a t-2 dog"]


def test_the_script_for_diffusers_is_python_and_holds_no_code_of_a_prompt(file: Path, tmp_path: Path) -> None:
    nasty = "'''\"\"\" \\ {} %s \U0001f600 ) import os #"
    flags = [
        "--to",
        "diffusers",
        "--prompt",
        f"* {nasty}",
        "--scale",
        "3",
        "--steps",
        "7",
        "--outdir",
        str(tmp_path / "o"),
    ]
    path = run(DESCRIPTION, [str(file), "--name", "teddy", *flags])[-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            values[ast.unparse(target)] = ast.literal_eval(node.value)
    assert values["PROMPTS"] == [f"teddy-{stage} {nasty}" for stage in range(10)]
    assert values["FILES"] == [f"teddy-{stage}.safetensors" for stage in range(10)]
    assert values["(STEPS, GUIDANCE, SEED)"] == (7, 3.0, 42)
    assert values["NAME"] == "teddy"


def test_a_concept_of_the_small_model_gets_its_size_and_guidance(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for concept, given, expected in (
        ("models/demo/concepts/dotted-star.safetensors", [], "CFG scale 2.5, seed 42, 128x128"),
        ("models/demo/concepts/dotted-star.safetensors", ["--scale", "3", "--width", "32"], "3.0, seed 42, 32x128"),
        (file, [], "CFG scale 10.0, seed 42, 512x512"),
    ):
        flags = ["--name", "a", "--to", "a1111", "--outdir", str(tmp_path / "o"), "--force", *given]
        assert expected in run(DESCRIPTION, [str(concept), *flags])[-1].read_text(encoding="utf-8")


def test_the_negative_prompt_is_in_all_three(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(file), "--name", "teddy", "--to", *PROGRAMS, "--negative_prompt", 'a "blurry" (dog)']
    script, text, workflow = run(DESCRIPTION, [*flags, "--outdir", str(tmp_path / "o")])[-3:]
    assert "\nNEGATIVE = 'a \"blurry\" (dog)'\n" in script.read_text(encoding="utf-8")
    assert '\nNegative prompt: a "blurry" \\(dog\\)\n' in text.read_text(encoding="utf-8")
    nodes = json.loads(workflow.read_text(encoding="utf-8"))
    sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    assert nodes[sampler["negative"][0]]["inputs"]["text"] == 'a "blurry" \\(dog\\)'
    refused = refusal(capsys, str(file), "--name", "a", "--negative_prompt", "no *", "--outdir", str(tmp_path / "p"))
    assert "negative_prompt has the placeholder '*'" in refused


def test_the_prompt_of_the_web_ui_is_the_last_line(file: Path, tmp_path: Path) -> None:
    flags = [
        "--to",
        "a1111",
        "--preset",
        "layout",
        "--prompt",
        "a dog *",
        "--steps",
        "20",
        "--outdir",
        str(tmp_path / "o"),
    ]
    text = run(DESCRIPTION, [str(file), "--name", "teddy", *flags])[-1].read_text(encoding="utf-8")
    assert text.splitlines()[-1] == "a dog [teddy-9::1]"
    assert "Made for 20 steps of ddim" in text and "teddy-0.safetensors … teddy-9.safetensors" in text


def test_several_concepts_and_words_from_a_file(file: Path, tmp_path: Path) -> None:
    save_concept(Concept(torch.zeros(1, 16)), tmp_path / "b.safetensors")
    (tmp_path / "words.yaml").write_text("prompt: a *\nprospect_words: ['* <b>', <b>]\n", encoding="utf-8")
    flags = ["--name", "teddy", "vase", "--to", "a1111", "--steps", "10", "--words", str(tmp_path / "words.yaml")]
    sources = [str(file), f"<b>={tmp_path / 'b.safetensors'}"]
    paths = run(DESCRIPTION, [*sources, *flags, "--outdir", str(tmp_path / "o")])
    assert [path.name for path in paths][9:] == ["teddy-9.safetensors", "vase-0.safetensors", "teddy_a1111.txt"]
    # two words are two stages; the ten vectors are read at the middle of each
    assert paths[-1].read_text(encoding="utf-8").splitlines()[-1] == "a [teddy-2:4] vase-0"


def test_a_warning_is_on_standard_error_and_in_the_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", "teddy", "--to", "a1111", "--sampler", "UniPC", "--outdir", str(tmp_path / "o")]
    paths = run(DESCRIPTION, [str(file), *flags])
    warning = capsys.readouterr().err
    assert warning.startswith("warning: The timesteps of 'UniPC' are not known") and warning.count("\n") == 1
    assert f"Not exact: {warning.removeprefix('warning: ')}" in paths[-1].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--to", "diffusers", "--steps", "30"], "With 30 steps diffusers' DDIM takes other timesteps"),
        (["--to", "comfyui", "--sampler", "Heun"], "'Heun' becomes ddim in the workflow for ComfyUI"),
        (["--to", "diffusers", "comfyui", "--steps", "40", "--sampler", "Euler a"], ""),
    ],
)
def test_what_is_not_exact_is_said(
    flags: list[str], warning: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(DESCRIPTION, [str(file), "--name", "teddy", *flags, "--outdir", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {warning}") if warning else said == ""


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("DPM++ 2M", "Uniform"), ("DPM++ 2M Karras", "Karras"), ("ddim", "")]
)
def test_the_web_ui_is_told_the_schedule(sampler: str, schedule: str, file: Path, tmp_path: Path) -> None:
    flags = ["--name", "teddy", "--to", "a1111", "--sampler", sampler, "--outdir", str(tmp_path / "o")]
    text = run(DESCRIPTION, [str(file), *flags])[-1].read_text(encoding="utf-8")
    told = f"{sampler} (schedule type: {schedule}, not Automatic), CFG" if schedule else f"{sampler}, CFG"
    assert f"steps of {told}" in text


def test_no_stage_of_any_concept_is_lost(file: Path, tmp_path: Path) -> None:
    """Nor where the first has one only; a preset has the same stages."""
    save_concept(Concept(torch.zeros(1, 16)), tmp_path / "one.safetensors")
    sources = [str(tmp_path / "one.safetensors"), f"<b>={file}"]
    flags = ["--name", "one", "ten", "--to", "a1111", "--steps", "10", "--prompt", "a <b> by *"]
    for more in ([], ["--preset", "material"]):  # which is of stages 0 to 4 of the concept that is named first
        paths = run(DESCRIPTION, [*sources, *flags, *more, "--outdir", str(tmp_path / f"o{len(more)}")])
        assert paths[-1].read_text(encoding="utf-8").splitlines()[-1].count("ten-") == 10


# Refusals


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(DESCRIPTION, list(flags))
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", "..", ".", "", "a b", "ä", "a\n", "-a", "a--b", "a.b", "C:x", "a" * 101, "~", "$HOME"],
)
def test_names_that_are_no_file_names_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used; use letters"):
        check_name(name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        run(DESCRIPTION, [str(file), f"--name={name}", "--outdir", str(tmp_path / "out")])
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are() -> None:
    assert [check_name(name) for name in ("teddy", "my-teddy_2", "T")] == ["teddy", "my-teddy_2", "T"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--name", "a", "b"], "1 concepts and 2 names"),
        (["--name", "a", "--to", "invokeai"], "invalid choice: 'invokeai'"),
        (["--name", "a", "--prompt", "a", "--prompt", "b"], "--prompt is given twice"),
        (["--name", "a", "--steps", "0"], "must be in 1..1000, not 0"),
        (["--name", "a", "--preset", "mood"], "Unknown preset 'mood'"),
        (["--name", "a", "--word", "x", "--word", "11"], "prospect_words[1] = 11"),
        (["--name", "a", "--words", "none.yaml"], "There is no file 'none.yaml'"),
        (["--name", "a", "--nme", "b"], "unknown argument '--nme'; did you mean --name?"),
        (["--name", "a", "--card", "--pictures", "none.png"], "There is no file 'none.png'"),
        (["--name", "a", "--card", "--pictures", "x/s.png", "y/s.png"], "have the same name in two folders"),
        (["--name", "a", "--pictures", "s.png"], "say --card, too"),
        (["--name", "a", "--to", "diffusers", "--steps", "1000"], "at most 999 steps"),
        (["--name", "a", "--words", "{folder}/words.yaml"], "prompt must be a text, not 5"),
    ],
)
def test_mistakes_end_with_a_sentence(
    flags: list[str], sentence: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.yaml").write_text("prompt: 5\n")
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    assert sentence in refusal(capsys, str(file), "--outdir", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_two_concepts_of_one_name_are_refused(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--name", "a", "A", "--outdir", str(tmp_path / "out")]
    assert "are not all different" in refusal(capsys, str(file), f"<b>={file}", *flags)


def test_a_placeholder_around_a_star_is_refused(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--name", "a", "--outdir", str(tmp_path / "out")]
    assert "The placeholder '<*>' must not contain '*'" in refusal(capsys, f"<*>={file}", *flags)


def test_nothing_is_overwritten_unless_said(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("teddy-3.safetensors", "teddy_a1111.txt", "README.md"):
        (out / name).write_text("mine")
        flags = [str(file), "--name", "teddy", "--to", *PROGRAMS, "--card", "--outdir", str(out)]
        assert f"has {name} already; say --force" in refusal(capsys, *flags)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"
        assert (out / name) in run(DESCRIPTION, [*flags, "--force"])
        assert (out / name).read_bytes() != b"mine"
        for path in out.iterdir():
            path.unlink()


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "scripts/export_embedding.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment, check=True)
    assert "--to PROGRAM" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "PIL", "transformers", "yaml"}


# The card


def test_the_card_says_what_the_hub_wants_to_know(file: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "sample.png")
    flags = ["--name", "teddy", "--to", "a1111", "--card", "--pictures", str(tmp_path / "sample.png")]
    out = tmp_path / "out"
    run(DESCRIPTION, [str(file), *flags, "--outdir", str(out)])
    _, front, body = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert header["license"] == "creativeml-openrail-m"
    assert {"stable-diffusion", "text-to-image", "diffusers", "textual_inversion", "prospect"} <= set(header["tags"])
    assert header["widget"] == [{"text": "sample", "output": {"url": "sample.png"}}]
    assert "# teddy" in body and "learned in 600 steps, from the word “teddy”" in body and "ab" * 32 in body
    assert "![sample](sample.png)" in body and (out / "sample.png").is_file()
    assert "teddy_a1111.txt" in body and "ComfyUI, a workflow" not in body


def test_the_card_of_a_concept_that_says_nothing_of_itself(tmp_path: Path) -> None:
    save_concept(Concept(torch.zeros(1, 16), {"init_word": "`x`\n---\n# <b>"}), tmp_path / "c.safetensors")
    flags = ["--name", "c", "--card", "--license", "mit", "--base_model", "me/model", "--outdir", str(tmp_path / "o")]
    path = run(DESCRIPTION, [str(tmp_path / "c.safetensors"), *flags])[-1]
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit" and yaml.safe_load(front)["base_model"] == "me/model"
    assert "1 stages of width 16, from the word “x --- # b”." in body
