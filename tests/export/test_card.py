"""The model card: what the hub reads, and that files' own texts mean nothing in it."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image

from ldm.embeddings import Concept
from ldm.export.card import Card, escaped, model_card
from ldm.generate import PNG_KEY, save_picture

METADATA = {"init_word": "teddy", "step": "600", "base_model": "sd-v1-4.ckpt", "base_model_fingerprint": "ab" * 8}
PLAIN = Card()
NASTY = "`x`\n---\n# <b>\x1b[31m](javascript:0) <script>$a$ **b** |c| ![i](u) \u202e" + "y" * 500


def card(metadata: dict[str, str], given: Card = PLAIN, uses: tuple[str, ...] = ()) -> ModelCard:
    return ModelCard(model_card({"*": ("teddy", Concept(torch.zeros(2, 16), metadata))}, uses, given))


def image(path: Path, **record: object) -> Path:
    picture = Image.new("RGB", (8, 8))
    if record:
        picture.info[PNG_KEY] = json.dumps(record)
    save_picture(picture, path)
    return path


def test_the_hub_finds_what_it_wants_to_know(tmp_path: Path) -> None:
    sample = image(tmp_path / "my sample.png", prompt="*", prospect_words=["a teddy", None, "a teddy", 3])
    found = card(METADATA, Card(images=[sample]), ("teddy_a1111.txt",))
    data, text = found.data, found.text
    assert (data.base_model, data.base_model_relation) == ("CompVis/stable-diffusion-v1-4", "adapter")
    kind = (data.license, data.library_name, data.pipeline_tag)
    assert kind == ("creativeml-openrail-m", "diffusers", "text-to-image")
    assert {"stable-diffusion", "text-to-image", "diffusers", "textual_inversion", "prospect"} <= set(data.tags)
    assert data.instance_prompt == "teddy-0, teddy-1"
    assert data.widget == [{"text": "a teddy / 3", "output": {"url": "my%20sample.png"}}]
    identity = Concept(torch.zeros(2, 16)).identity
    assert f"- `teddy-0` … `teddy-1`: 2 stages of width 16, identity {identity}, learned in 600 steps" in text
    assert f"from the word “teddy”, for the base model sd-v1-4.ckpt (fingerprint {'ab' * 8})." in text
    assert "![a teddy / 3](my%20sample.png)" in text and "<!-- SHA-256: my%20sample.png " in text
    assert "- `teddy_a1111.txt`: AUTOMATIC1111's" in text and "ComfyUI, a workflow" not in text


def test_a_concept_that_says_nothing_of_itself_and_flags_that_do() -> None:
    found = card({}, Card("mit", "me/model"))
    assert (found.data.license, found.data.base_model) == ("mit", "me/model")
    assert "2 stages of width 16, identity" in found.text and "learned in" not in found.text
    assert not {"base_model", "base_model_relation", "widget"} & card({}).data.to_dict().keys()


def test_texts_from_files_mean_nothing(tmp_path: Path) -> None:
    nasty = dict.fromkeys(METADATA, NASTY)
    sample = image(tmp_path / "s.png", prompt=NASTY, prospect_words=None)
    plain = card(dict.fromkeys(METADATA, "x"), Card(images=[image(tmp_path / "p.png", prompt="x")]))
    found = card(nasty, Card(images=[sample]))
    assert found.data.tags == plain.data.tags and found.text.count("\n") == plain.text.count("\n")
    assert len(found.text) < len(plain.text) + 8 * 200
    assert "\x1b" not in found.content and "\u202e" not in found.content and "<script>" not in found.text
    strange = found.text.replace(escaped(NASTY), "")
    assert "y" * 9 not in strange and "javascript" not in strange


def test_escapes() -> None:
    for text, expected in {
        "a\r\n\tb  c\x00\x9b": "a b c",
        "<b>&": "&lt;b&gt;&amp;",
        "[a](b) `c` *d* _e_": r"\[a\]\(b\) \`c\` \*d\* \_e\_",
        "|f| ~g~ $h$ \\(": r"\|f\| \~g\~ \$h\$ \\\(",
        "http://x.y www.x.y a@b.c": r"http:\//x.y www\.x.y a\@b.c",
        "sd-v1-4.ckpt größer 日本 😀": "sd-v1-4.ckpt größer 日本 😀",
        "x" * 120: "x" * 120,
        "x" * 121: "x" * 119 + "…",
    }.items():
        assert escaped(text) == expected
