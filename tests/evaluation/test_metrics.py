"""Scores of images: identities of the definitions with a stub, CLIP's preprocessing, NS-LPIPS, and the command."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from evaluation.metrics.alignment import (
    alignment,
    cut_out,
    geometric_mean,
    masked_alignment,
    without_placeholder,
)
from evaluation.metrics.backbones import Backbone, clip_backbone, clip_pixels
from evaluation.metrics.ns_lpips import as_tensor, masked_pair, ns_lpips, score_folders
from evaluation.metrics.report import ALL, Case, aggregate, filled, read_images, score, write
from ldm.embeddings import Concept
from scripts import evaluate

DEMO = Path("models/demo")
WORD = torch.tensor([1.0, 0.0, 0.0])


def colours(*values: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> list[Image.Image]:
    return [Image.new("RGB", size, value) for value in values]


def noise(seed: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def stub(scale: float = 1.0) -> Backbone:
    """Features are the mean colour, scaled; every text is red."""

    def mean(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 255

    def texts(texts: Sequence[str]) -> Tensor:
        return WORD.expand(len(texts), -1) * 3

    return Backbone("stub", "none", mean, lambda pixels: pixels.mean(dim=(2, 3)) * scale, texts)


RED, GREEN, GREY = (255, 0, 0), (0, 255, 0), (99, 99, 99)


def test_definitions() -> None:
    one, two = colours(RED, GREEN), [noise(1), noise(2), noise(3)]
    found = alignment(stub(), one, one, "")
    assert torch.equal(found["image"], torch.eye(2)) and found["text"].tolist() == [1.0, 0.0]
    # the mean over all pairs of a set with itself is the squared length of its mean feature, and not 1
    features = torch.nn.functional.normalize(stub().image_features(two), dim=-1)
    same = alignment(stub(), two, two, "")["image"].mean()
    torch.testing.assert_close(same, features.mean(dim=0).square().sum())
    # neither order nor length of features count
    for other in (alignment(stub(), two[::-1], one, ""), alignment(stub(7.0), two, one, "")):
        torch.testing.assert_close(other["image"].mean(), alignment(stub(), two, one, "")["image"].mean())


@pytest.mark.parametrize(
    ("prompt", "placeholder", "text"),
    [
        ("a photo of *", "*", "a photo of"),
        ("a photo of {}", "*", "a photo of"),
        ("a <cat-toy> on the moon", "<cat-toy>", "a on the moon"),
        ("a photo of *, at night", "*", "a photo of, at night"),
        ("*", "*", ""),
    ],
)
def test_the_placeholder_is_removed(prompt: str, placeholder: str, text: str) -> None:
    assert without_placeholder(prompt, placeholder) == text
    assert without_placeholder("a photo of *", keep_blanks=True) == "a photo of "


def test_masks(caplog: pytest.LogCaptureFixture) -> None:
    one, other, white, black = noise(1), noise(2), *(Image.new("L", (8, 6), value) for value in (255, 0))

    def masked(mask: Image.Image, other_mask: Image.Image, background: str = "black") -> dict[str, Tensor]:
        return masked_alignment(stub(), {"a": one}, {"b": other}, {"a": mask, "b": other_mask}, "", background)

    whole, same = alignment(stub(), [one], [other], ""), masked(white, white)
    assert all(torch.equal(whole[name], same[name]) for name in whole) and not caplog.records
    half = Image.new("L", (8, 6), 0)
    half.paste(1, (0, 0, 4, 6))  # any value above 0 is inside
    left = np.array(cut_out(one, half))
    assert (left[:, :4] == np.array(one)[:, :4]).all() and not left[:, 4:].any()
    assert cut_out(one, black, "mean").getextrema() == ((123, 123), (116, 116), (104, 104))
    assert "A mask is empty" in caplog.text and masked(black, black, "mean")["image"].item() == pytest.approx(1)
    with pytest.raises(ValueError, match="no masks for b"):
        masked_alignment(stub(), {"a": one}, {"b": other}, {"a": white}, "")
    with pytest.raises(ValueError, match=r"'b': the image has \(8, 6\) pixels and its mask \(6, 8\)"):
        masked(white, white.resize((6, 8)))


def test_rows(tmp_path: Path) -> None:
    images = dict(zip("abc", colours(RED, GREEN, GREY), strict=True))
    rows = score(stub(), Case("star", "a *", "a", images, {"b": images["b"]}, {}))
    found = {row.metric: (row.mean, row.count) for row in rows}
    image = pytest.approx((1 + 3**-0.5) / 3)
    assert found == {"image": (image, 3), "text": (0.0, 1), "geometric_mean": (0.0, 1)}
    masks = {f"{kind} {name}": Image.new("L", (8, 6), 255) for name in "abc" for kind in ("reference", "generated")}
    more = score(stub(), Case("star", "two *", "two", images, {"a": images["a"]}, masks))
    assert [row.metric for row in more] == [f"{kind}{name}" for kind in ("", "masked_") for name in found]
    overall = {row.metric: row for row in aggregate([*rows, *more])}
    text = overall["text"]
    assert (text.mean, text.std, text.prompt, text.count) == (pytest.approx(0.5), pytest.approx(0.5), ALL, 2)
    assert overall["masked_text"].count == 1
    table, records = write([*rows, *overall.values()], tmp_path)
    with table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines] == [record["metric"] for record in json.loads(records.read_text())]
    assert lines[0]["backbone"] == "stub" and lines[0]["preprocessing"] == "none, background black"


def test_a_negative_product_is_no_number(tmp_path: Path) -> None:
    assert geometric_mean(0.25, 0.64) == pytest.approx(0.4) and math.isnan(geometric_mean(-0.25, -0.64))
    rows = score(stub(-1.0), Case("", "", "", {"a": colours(RED)[0]}, {"b": colours(RED)[0]}, {}))
    assert [row.mean for row in rows] == [1.0, -1.0, None] and aggregate(rows)[-1].mean is None
    json.loads(write(rows, tmp_path)[1].read_text(), parse_constant=pytest.fail)


def test_images_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a-thing"
    folder.mkdir()
    for name in ("a-thing.jpg", "a-thing_78.jpg", ".hidden.png"):
        noise(1).save(folder / name)
    (folder / "Thumbs.db").write_bytes(b"no image")
    assert list(read_images(folder)) == ["a-thing_78.jpg"]  # the first is CatVersion's grid
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_images(tmp_path / "clear.png")["clear.png"].getpixel((0, 0)) == (0, 0, 0)


# NS-LPIPS; tests/parity has the reference's scores


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("mode", ["paper", "standard"])
def test_what_is_masked_does_not_count(mode: str) -> None:
    one, other = noise(0, (30, 40)), noise(1, (30, 40))
    black, white = (Image.new("L", (30, 40), v) for v in (0, 255))
    half, changed = white.copy(), one.copy()
    half.paste(0, (0, 0, 30, 20))
    changed.paste(other.crop((0, 0, 30, 15)), (0, 0))
    cases = {"empty": (one, other, black), "same": (one, one, white), "masked": (one, changed, half)}
    scores = ns_lpips({**cases, "all": (one, other, white)}, distance, mode).scores
    assert scores["empty"] == scores["same"] == 0 and scores["masked"] < 1e-3 * scores["all"]


def test_soft_masks() -> None:
    """Only `standard` makes a grey mask black and white."""
    image, grey = noise(0), Image.new("L", (8, 8), 100)
    soft, hard = (masked_pair(image, image, grey, mode)[0] for mode in ("paper", "standard"))
    torch.testing.assert_close(soft[0], as_tensor(image) * 0.9999 * 100 / 255)
    assert not hard.any()
    with pytest.raises(ValueError, match="mode must be one of paper, standard"):
        masked_pair(image, image, grey, "hard")


def test_scores_of_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("sources", "edits", "masks")]
    for folder, image in zip(folders, (noise(0), noise(1), Image.new("L", (9, 9), 255)), strict=True):
        folder.mkdir()
        image.save(folder / "1 a [dog].png")
    noise(2).save(folders[0] / "2 a cat.png")
    found = score_folders(*folders, distance)
    assert list(found.scores) == ["1 a [dog]"] and found.missing == ("2 a cat",)
    assert "1 cases; 1 without files: 2 a cat" in str(found)
    Image.new("L", (9, 9), 0).save(folders[2] / "1 a [dog].png")
    with pytest.raises(ValueError, match=r"mask of '1 a \[dog\]' is empty"):
        score_folders(*folders, distance)
    (folders[1] / "1 a [dog].png").unlink()
    with pytest.raises(ValueError, match="No case has a source, an edit and a mask"):
        score_folders(*folders, distance)


# Backbones


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of transformers with the small model's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 703, "max_position_embeddings": 32, "eos_token_id": 702, "bos_token_id": 701}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / "tokenizer" / name).read_bytes())
    return folder


def test_clip_of_transformers(tiny_clip: Path) -> None:
    backbone, images = clip_backbone(tiny_clip), [noise(1, (40, 50)), noise(2, (64, 33))]
    found = alignment(backbone, images, images, "a star")
    model = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[0]]), pixel_values=torch.stack([clip_pixels(x, side=32) for x in images]))
    torch.testing.assert_close(found["image"], out.image_embeds @ out.image_embeds.T, rtol=0, atol=1e-5)
    assert "bicubic" in backbone.preprocessing and backbone.name.startswith("CLIP ")
    with pytest.raises(ValueError, match="more than 32 tokens"):
        backbone.encode_text(["a star " * 40])
    with pytest.raises(ValueError, match="There is no CLIP model"):
        clip_backbone(DEMO)


def test_resizing_without_antialiasing_differs_little() -> None:
    image = Image.open("models/demo/references/dotted-star/dotted-star.png").convert("RGB").resize((500, 300))
    smooth, rough = clip_pixels(image), clip_pixels(image, antialias=False)
    assert smooth.shape == (3, 224, 224) and 1e-3 < (smooth - rough).abs().mean() < 0.2


# The command


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()


def rows_of(folder: Path) -> dict[tuple[str, str], float]:
    return {(row["prompt"], row["metric"]): row["mean"] for row in json.loads((folder / "scores.json").read_text())}


def test_the_small_models_towers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt that says what an image shows scores higher than others; its own image is the nearest."""
    star = DEMO / "references/dotted-star"
    for shown in ("dotted-star", "striped-heart"):
        flags = ["--references", star, "--generated", DEMO / "references" / shown, "--outdir", tmp_path / shown]
        run(monkeypatch, *flags, "--prompt", "a dotted star")
        assert "images are scored by the small model's towers" in caplog.text
    own, other = (rows_of(tmp_path / shown) for shown in ("dotted-star", "striped-heart"))
    assert own["a dotted star", "image"] == pytest.approx(1, abs=1e-5)
    assert other["a dotted star", "image"] < 0.9
    assert own["a dotted star", "text"] > other["a dotted star", "text"] + 0.1


def test_images_of_a_concept_are_made_and_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {} on a white background\n\na red {}\n", encoding="utf-8")
    flags = ["--references", DEMO / "references/dotted-star", "--prompts", tmp_path / "prompts.txt", "--steps", 2]
    flags += ["--concept", DEMO / "concepts/dotted-star.safetensors", "--count", 3, "--batch", 2, "--outdir", tmp_path]
    run(monkeypatch, *flags)
    made = rows_of(tmp_path)
    assert len(made) == 3 * 3 and (ALL, "image") in made
    # the images that were written score the same
    again = ["--references", DEMO / "references/dotted-star", "--prompts", tmp_path / "prompts.txt"]
    run(monkeypatch, *again, "--generated", tmp_path / "images", "--outdir", tmp_path / "again")
    assert rows_of(tmp_path / "again") == pytest.approx(made, abs=1e-6)


def test_a_class_word_takes_the_placeholders_place() -> None:
    prefix = {"prefix": torch.zeros(2, 2, 1, 4, 32)}
    described = {"catversion.text_layers": "1,2", "catversion.logit_bias": "1.0"}
    known = Concept(prefix, {**described, "captions": "a photo of a thing\na thing"}, "catversion")
    assert filled("a large {} here", known) == "a large thing here" and filled("thing", known) == "thing"
    assert filled("a large {} here", Concept(torch.zeros(10, 4))) == "a large * here"
    with pytest.raises(ValueError, match="does not say its class word"):
        filled("a large {} here", Concept(prefix, described, "catversion"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--generated x --prompt x --reference_masks {demo}", "needs --reference_masks and"),
        ("--generated {demo}/nowhere --prompt x", "There are no images"),
        ("--generated {demo}/concepts --prompt x", "There is no image in"),
        ("--generated {demo}/references --prompts {demo}/README.md", "There is no folder"),
        ("--generated {demo} --prompts {demo}/nowhere.txt", "There is no file"),
        ("--concept {demo}/README.md --prompt x", "is of an unknown format"),
        ("--generated {demo}/references/dotted-star --prompt x --clip {demo}", "There is no CLIP model"),
        ("--prompt x", "one of the arguments --generated --concept is required"),
    ],
)
def test_mistakes(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags.format(demo=DEMO).split()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--references", DEMO / "references/dotted-star", *given, "--outdir", tmp_path / "out")
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
