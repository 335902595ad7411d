"""Exported concepts: the files, what stands in them, what is refused; `scripts/export_embedding.py`."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ldm.cli.export import run
from ldm.conditioning.prompts import PromptReader
from ldm.embeddings import Concept, EmbeddingError, load_concept, save_concept
from ldm.export import files
from ldm.export.files import PROGRAMS, Export, Use
from ldm.export.texts import Learned, check_name, may_be_cut

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models/demo/concepts/dotted-star.safetensors"
METADATA = {"init_word": "teddy", "step": "600", "base_model": "sd-v1-4.ckpt", "base_model_fingerprint": "ab" * 8}


def concept(seed: int = 0, stages: int = 10) -> Concept:
    return Concept(torch.randn(stages, 16, generator=torch.Generator().manual_seed(seed)), METADATA)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_concept(concept(), tmp_path / "teddy.safetensors", "<teddy>")
    return tmp_path / "teddy.safetensors"


def export(*flags: str | Path) -> list[Path]:
    """What the command writes, called teddy where no name is given."""
    named = [] if "--name" in flags else ["--name", "teddy"]
    return run([*map(str, flags), *named])


def texts_of(*flags: str | Path) -> list[str]:
    """What stands in the files that show how the concepts are used."""
    return [path.read_text(encoding="utf-8") for path in export(*flags) if path.suffix != ".safetensors"]


def test_stage_files_have_one_vector_each_and_come_back_as_the_concept(file: Path, tmp_path: Path) -> None:
    out, original = tmp_path / "out", load_concept(file)
    paths = export(file, "--outdir", out)
    assert [path.name for path in paths] == [f"teddy-{stage}.safetensors" for stage in range(10)]
    for stage, path in enumerate(paths):
        with safe_open(path, "pt") as opened:
            assert opened.keys() == [f"teddy-{stage}"]  # what every program takes for a textual inversion of one token
            vector = opened.get_tensor(f"teddy-{stage}")
        assert vector.dtype == torch.float32 and torch.equal(vector, original.vectors[stage])
    for source in (out, paths, paths[::-1], *paths):
        again = load_concept(source)
        assert torch.equal(again.vectors, original.vectors) and again.metadata == original.metadata
    save_concept(concept(1, stages=12), file)  # 10 comes after 9
    export(file, "--outdir", more := tmp_path / "more")
    for source in (more, sorted(more.iterdir()), more / "teddy-7.safetensors"):
        assert torch.equal(load_concept(source).vectors, concept(1, stages=12).vectors)


# Texts


def test_texts_say_what_our_own_reader_reads() -> None:
    """The slots of our prompts are those of the exported texts, when names are looked up in them as tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/demo/tokenizer")
    concepts = {"*": ("star", concept()), "<b>": ("b", concept(1, stages=4))}
    rows = {"*": [[row] for row in range(10)], "<b>": [[10 + row] for row in concepts["<b>"][1].rows_for(10)]}
    words = ["a * on*,<b><b>", 3, None, 0, "", "* *", "a <b>'s *", "(x) [y]: z|*", "   a   heart ", "*"]
    reader = PromptReader(tokenizer, rows, 10, 32)
    tokens = {f"star-{k}": -(k + 1) for k in range(10)} | {f"b-{k}": -(11 + k) for k in range(4)}
    for prompt in ("*", "two * and <b> , *!", "a <b> heart"):
        texts = Export(concepts, Use(prompt, words))._texts()
        for stage, slots in enumerate(reader.read([prompt], words)[:, 0].tolist()):
            found = []
            for word in texts[stage].split(" "):
                found += [tokens[word]] if word in tokens else tokenizer(word, add_special_tokens=False)["input_ids"]
            assert slots[1 : len(found) + 1] == found and set(slots[len(found) + 1 :]) == {tokenizer.eos_token_id}


def test_the_script_for_diffusers_holds_no_code_of_a_prompt(file: Path, tmp_path: Path) -> None:
    nasty = "'''\"\"\" \\ {} %s \U0001f600 ) import os #"
    flags = ("--to", "diffusers", "--scale", "3", "--steps", "7", "--outdir", tmp_path / "o")
    (script,) = texts_of(file, "--prompt", f"* {nasty}", *flags)
    values = {}
    for node in ast.parse(script).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            values[ast.unparse(target)] = ast.literal_eval(node.value)
    assert values["PROMPTS"] == [f"teddy-{stage} {nasty}" for stage in range(10)]
    assert values["FILES"] == [f"teddy-{stage}.safetensors" for stage in range(10)]
    assert (values["(STEPS, SEED)"], values["GUIDANCE"], values["RESCALE"]) == ((7, 42), 3.0, 0.0)
    assert values["NAME"] == "teddy" and values["CONCEPTS"] == {"teddy": concept().identity}


def test_negative_prompt_and_guidance_in_all_three(file: Path, tmp_path: Path, capsys) -> None:
    """Guidance by stage, and rescaled, is what only diffusers has."""
    flags = ("--to", *PROGRAMS, "--negative_prompt", 'a "blurry" (dog)', "--scale", "2.5,0-1:1", "--rescale", "0.5")
    script, text, workflow = texts_of(file, *flags, "--outdir", tmp_path / "o")
    assert "\nNEGATIVE = 'a \"blurry\" (dog)'\n" in script and "\nRESCALE = 0.5" in script
    assert "\nGUIDANCE: float | list[float] = [1.0, 1.0, 2.5" in script
    assert '\nNegative prompt: a "blurry" \\(dog\\)\n' in text and "CFG scale 2.5" in text
    nodes = json.loads(workflow)
    sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    assert nodes[sampler["negative"][0]]["inputs"]["text"] == 'a "blurry" \\(dog\\)' and sampler["cfg"] == 2.5
    warned = capsys.readouterr().err
    for program in ("the web UI", "the workflow for ComfyUI"):
        assert f"In {program} guidance is the same in all stages, 2.5." in warned
        assert f"In {program} guidance is not rescaled." in warned


def test_several_concepts_and_stages(file: Path, tmp_path: Path) -> None:
    """No stage is lost, also where the first concept has one only; a preset has the same stages."""
    save_concept(concept(1, stages=1), one := tmp_path / "one.safetensors")
    flags = ("--to", "a1111", "--steps", "10", "--prompt")
    given = ("--name", "ten", "one", *flags, "a *", "--stages", "0-4=2", "5-=<b>", "--outdir", tmp_path / "o")
    paths = export(file, f"<b>={one}", *given)
    assert [path.name for path in paths][9:] == ["ten-9.safetensors", "one-0.safetensors", "ten_a1111.txt"]
    assert paths[-1].read_text().splitlines()[-1] == "a [one-0:ten-2:4]"
    for more in ((), ("--preset", "material")):  # which is of stages 0 to 4 of the concept that is named first
        given = ("--name", "one", "ten", *flags, "a <b> by *", *more, "--outdir", tmp_path / f"o{len(more)}")
        (text,) = texts_of(one, f"<b>={file}", *given)
        assert text.splitlines()[-1].count("ten-") == 10


def test_what_the_text_for_the_web_ui_says(file: Path, tmp_path: Path) -> None:
    made = ("teddy-0.safetensors … teddy-9.safetensors into", "for 50 steps of ddim, CFG scale 10.0, seed 42, 512x512")
    cases = {
        (): (*made, f"Concepts: teddy {concept().identity}\n"),
        ("--preset", "layout", "--prompt", "a dog *", "--steps", "20"): ("\n\na dog [teddy-9::1]\n",),
        ("--sampler", "DPM++ 2M"): ("steps of DPM++ 2M (schedule type: Uniform, not Automatic), CFG",),
        ("--sampler", "DPM++ 2M Karras"): ("of DPM++ 2M Karras (schedule type: Karras, not Automatic), CFG",),
    }
    for number, (flags, parts) in enumerate(cases.items()):
        (text,) = texts_of(file, "--to", "a1111", *flags, "--outdir", tmp_path / str(number))
        assert all(part in text for part in parts)


def test_size_and_guidance_are_those_of_the_small_model_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for place in (ROOT, tmp_path):
        monkeypatch.chdir(place)
        for given in ((), ("--scale", "3", "--width", "32")):
            texts += texts_of(DEMO, "--to", "a1111", "--outdir", tmp_path / str(len(texts)), *given)
    assert "CFG scale 2.5, seed 42, 128x128" in texts[0] and "CFG scale 3.0, seed 42, 32x128" in texts[1]
    assert texts[:2] == texts[2:]


# What other programs read in another way


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--to diffusers --steps 30", "With 30 steps diffusers' DDIM takes other timesteps"),
        ("--to comfyui --sampler Heun", "'Heun' becomes ddim in the workflow for ComfyUI"),
        ("--to a1111 --sampler UniPC", "The timesteps of 'UniPC' are not known"),
        ("--to a1111 --prompt " + "word*" * 38, "The prompt may be longer than 75 tokens; what follows is cut off"),
        ("--to comfyui --negative_prompt " + "日本語" * 9, "The prompt may be longer than 75 tokens"),
        ("--to a1111 comfyui --prompt " + "words*" * 37, None),
        ("--to diffusers --prompt " + "word*" * 80, None),
        ("--to comfyui --prompt *http://x", "ComfyUI takes what follows // for a comment"),
        ("--to comfyui --prompt *{a|b}", "ComfyUI's page takes {a|b} for a choice"),
        ("--to comfyui --prompt *,embedding:x --stages 0=embedding:x 1-=*", "ComfyUI takes a word that begins"),
        ("--prompt *(red:1.3)", "'(red:1.3)' is read as letters here, and is exported so that other programs do, too."),
        ("--to diffusers a1111 --prompt *{a//b}", None),
        ("--to diffusers comfyui --steps 40", None),
    ],
)
def test_what_is_not_exact_is_said(flags: str, warning: str | None, file: Path, tmp_path: Path, capsys) -> None:
    """On standard error, and in the text for the web UI."""
    paths = export(file, *flags.split(), "--outdir", tmp_path / "o")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {warning}") and said.count("\n") == 1 if warning else said == ""
    if warning and "--to a1111" in flags:
        assert f"Not exact: {warning}" in paths[-1].read_text(encoding="utf-8")


def test_a_word_that_would_be_read_as_a_learned_token_is_refused() -> None:
    texts = {"a star-3 by *": 10, "a STAR - 3 by *": 10, "a superstar-35 by *": 10, "* 0 hearts": 12}
    for prompt, stages in texts.items():  # of 12 stages, star-1 0 is read as star-10
        with pytest.raises(ValueError, match="in the prompt as a learned token; give the concept another --name"):
            Export({"*": ("star", concept(stages=stages))}, Use(prompt))
        Export({"*": ("vase", concept())}, Use(prompt))


def test_concepts_of_two_base_models_are_refused(file: Path, tmp_path: Path, capsys) -> None:
    flags = (file, f"<b>={tmp_path / 'b.safetensors'}", "--name", "a", "b", "--outdir", tmp_path / "out")
    for other in ({"base_model_fingerprint": "cd" * 8}, {"base_model": "sd-v1-5.ckpt"}):
        metadata = {"base_model": "sd-v1-4.ckpt"} | other  # the fingerprint decides; without it, the name
        save_concept(Concept(concept(1).vectors, metadata), tmp_path / "b.safetensors")
        said = refusal(capsys, *flags)
        assert "different base models: a for 'sd-v1-4.ckpt' (fingerprint abababababababab), b for 'sd-v1-" in said
    assert export(*flags, "--any_base")
    save_concept(Concept(concept(1).vectors), tmp_path / "b.safetensors")  # which says nothing
    assert export(*flags, "--force")


def test_several_tokens() -> None:
    """A learned word is as long as its vectors; diffusers' tokenizer finds further tokens in small letters only."""
    words = [Learned("star-0")] * 25
    assert may_be_cut(words, 4) and not may_be_cut(words, 3)
    tokens = Concept({"table": torch.zeros(1, 1, 2, 16)}, method="table")
    with pytest.raises(ValueError, match="diffusers reads one token of Star; use small letters"):
        Export({"*": ("Star", tokens)}).write(["diffusers"], Path("none"))


# Whole sets


def test_stage_files_of_two_concepts_are_refused(file: Path, tmp_path: Path) -> None:
    """Where a crash between two renames, or a user, has mixed two exports; the script: test_diffusers_usage.py."""
    old, new = tmp_path / "old", tmp_path / "new"
    export(file, "--outdir", old)
    save_concept(concept(1), file)
    export(file, "--outdir", new)
    for stage in range(5):
        os.replace(new / f"teddy-{stage}.safetensors", old / f"teddy-{stage}.safetensors")
    with pytest.raises(EmbeddingError, match="different concepts"):
        load_concept(old)


def test_a_failing_export_leaves_the_old_set(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the image that was there; the disk is full at each write in turn."""
    image, out = tmp_path / "sample.png", tmp_path / "out"
    Image.new("RGB", (8, 8)).save(image)
    flags = ("--to", *PROGRAMS, "--card", "--pictures", image, "--outdir", out, "--force")
    export(file, *flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save_concept(concept(1), file)
    Image.new("RGB", (8, 8), "red").save(image)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(out / "x"))

    for module, name in ((files, "save_stages"), (files.shutil, "copyfile"), (os, "fsync")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(module, name, full)
            export(file, *flags)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export(file, *flags)
    assert all((out / name).read_bytes() != content for name, content in before.items())


def test_nothing_is_overwritten_unasked_and_never_what_is_read(file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    flags = (file, "--to", *PROGRAMS, "--card", "--outdir", out)
    for name in ("teddy-3.safetensors", "teddy_a1111.txt", "README.md"):
        (out / name).write_text("mine")
        assert f"has {name} already; use --force" in refusal(capsys, *flags)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"
        assert (out / name) in export(*flags, "--force") and (out / name).read_bytes() != b"mine"
        for path in out.iterdir():
            path.unlink()
    save_concept(concept(1, stages=1), read := out / "teddy-0.safetensors")
    before = read.read_bytes()
    assert "would be overwritten" in refusal(capsys, read, "--force", "--outdir", out)
    assert read.read_bytes() == before


def test_stage_files_of_a_concept_with_more_stages_go(file: Path, tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "out/teddy-8.safetensors"
    export(file, "--outdir", out)
    theirs.unlink()
    save_file({"x": torch.zeros(1)}, theirs)  # of somebody else, so it stays
    save_concept(concept(7, stages=4), file)
    export(file, "--outdir", out, "--force")
    assert sorted(path.stem for path in out.glob("teddy-*")) == [f"teddy-{k}" for k in (0, 1, 2, 3, 8)]


# Refusals


def refusal(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        export(*flags)
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


def test_names_are_file_names_everywhere() -> None:
    assert [check_name(name) for name in ("teddy", "my-teddy_2", "T")] == ["teddy", "my-teddy_2", "T"]
    bad = ["../x", "a/b", "a\\b", "..", "", "a b", "ä", "a\n", "-a", "a--b", "a.b", "C:x", "~", "$HOME", "a" * 101]
    for name in (*bad, "BREAK", "rock-AND-roll", "con"):
        with pytest.raises(ValueError, match="cannot be used; use letters"):
            check_name(name)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--name ../x", "The name '../x' cannot be used"),
        ("--name a b", "1 concepts and 2 names"),
        ("<b>={file} --name a A", "are not all different"),
        ("<*>={file} --name a b", "The placeholder '<*>' must not contain '*'"),
        ("--to invokeai", "invalid choice: 'invokeai'"),
        ("--prompt a --prompt b", "--prompt is given twice"),
        ("--negative_prompt *", "negative_prompt has the placeholder '*'"),
        ("--steps 0", "must be in 1..1000, not 0"),
        ("--preset mood", "Unknown preset 'mood'"),
        ("--stages 0=x 1=11", "prospect_words[1] must be a text, a stage number in 0..9"),
        ("--stages 7-10=x", "'7-10=x' must be RANGE=TEXT, of the stages 0"),
        ("--ckpt none.ckpt", "There is no file 'none.ckpt', given with --ckpt"),
        ("--ckpt models/demo/model.safetensors", "' was learned for the base model 'sd-v1-4.ckpt'"),
        ("--nme b", "unknown argument '--nme'; did you mean --name?"),
        ("--card --pictures none.png", "There is no file 'none.png'"),
        ("--card --pictures x/s.png y/s.png", "have the same name; rename one"),
        ("--pictures s.png", "use --card, too"),
        ("--to diffusers --steps 1000", "at most 999 steps"),
        ("--scale x", "scale cannot be read from 'x'"),
        ("--scale 5,3:-1", "scale[3] must be in 0..1000"),
        ("--rescale 2", "rescale must be in 0..1"),
    ],
)
def test_mistakes_end_with_a_sentence(flags: str, sentence: str, file: Path, tmp_path: Path, capsys) -> None:
    given = [flag.format(file=file) for flag in flags.split()]
    assert sentence in refusal(capsys, file, *given, "--outdir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "scripts/export_embedding.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment, check=True)
    assert "--to PROGRAM" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "PIL", "transformers", "yaml"}
