"""The rendered world: images, captions, sample numbers, the tokenizer made for it, and sets of its images."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from evaluation.world.attributes import (
    FACTORS,
    RESOLUTION,
    attributes_from_words,
    caption,
    is_held_out,
    other_attributes,
    random_attributes,
    words_of,
    world_vocabulary,
)
from evaluation.world.rendered import RenderedWorld, render
from scripts import make_demo_tokenizer, render_world

STAR = attributes_from_words(["large", "striped", "red", "star", "left", "navy"])

# Images; that they show what the words say is what the judge reads in test_evidence.py


def test_an_image_is_the_same_alone_and_in_a_batch():
    attributes = random_attributes(70, seed=3)
    batch = render(attributes, range(70))
    assert batch.shape == (70, 3, RESOLUTION, RESOLUTION) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    for n in (0, 17, 69):
        assert torch.equal(render(attributes[n : n + 1], [n])[0], batch[n])
    assert torch.equal(render(attributes.flip(0), torch.arange(70).flip(0)), batch.flip(0))


def test_seeds_vary_an_image_a_little_and_the_resolution_shows_the_same():
    one, two = render(STAR.expand(2, -1), [1, 2])
    assert 0.005 < (one - two).abs().mean() < 0.2
    small, large = (render(STAR[None], [5], resolution) for resolution in (64, 256))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.02


# Words


def test_random_attributes():
    seen, unseen = random_attributes(6000, seed=1), random_attributes(600, seed=1, held_out=True)
    assert seen.shape == (6000, 6) and unseen.shape == (600, 6)
    assert not is_held_out(seen).any() and is_held_out(unseen).all()
    assert torch.equal(seen[:50], random_attributes(50, seed=1))
    assert not torch.equal(seen[:50], random_attributes(50, seed=2))
    assert (other_attributes(seen, np.random.default_rng(0)) != seen).all()
    shape, texture, colour = (len(FACTORS[name]) for name in ("shape", "texture", "colour"))
    rows = torch.cartesian_prod(*map(torch.arange, (1, 1, shape, texture, colour, 1)))
    held_out = rows[is_held_out(rows)]
    assert len(rows) == 12 * len(held_out)
    for column in held_out[:, 2:5].unbind(1):
        assert set(Counter(column.tolist()).values()) == {3}


def test_full_captions():
    assert caption(STAR) == "a large striped red star on the left on a navy background"
    heart = attributes_from_words(["centre", "small", "plain", "grey", "heart", "white"])
    assert caption(heart) == "a small plain grey heart in the centre on a white background"
    assert "star at the top on a" in caption(attributes_from_words(["large", "striped", "red", "star", "top", "navy"]))


def test_dropped_and_wrong_words():
    rng = np.random.default_rng(0)
    assert caption(STAR, rng) == caption(STAR)
    assert caption(STAR, rng, drop=1) == "a thing"
    full, own = set(caption(STAR).split()), set(words_of(STAR).values())
    false = set(caption(STAR, rng, wrong=1).split())
    assert not own & false and len(false - full) >= len(own)
    drops = [caption(STAR, rng, drop=0.25) for _ in range(2000)]
    for word in ("large", "striped", "red", "star", "left", "navy"):
        assert 0.7 < np.mean([word in text.split() for text in drops]) < 0.8
    wrongs = [caption(STAR, rng, wrong=0.25) for _ in range(2000)]
    assert 0.7 < np.mean(["red" in text.split() for text in wrongs]) < 0.8


# Samples


def world(*size: int, **options) -> RenderedWorld:
    """Without images."""
    made = RenderedWorld(*size, **options)
    made.with_images = False
    return made


def test_the_vocabulary_covers_every_caption_and_some_are_empty():
    samples = world(2000, empty=0.1, drop=0.3, wrong=0.3)
    captions = [samples[n]["caption"] for n in range(2000)]
    assert set(" ".join(captions).split()) <= set(world_vocabulary())
    assert 0.08 < captions.count("") / 2000 < 0.12
    values = [word for factor in FACTORS.values() for word in factor]
    assert len(set(values)) == len(values), "a word names two attributes"


def test_samples():
    samples = RenderedWorld(20, seed=4, resolution=32)
    sample = samples[25]
    assert len(samples) == samples.num_images == 20 and samples.attributes.shape == (20, 6)
    assert sample["sample"] == 25 and sample["flipped"] is False and sample["image"].shape == (32, 32, 3)
    assert torch.equal(sample["image"].permute(2, 0, 1), samples.images(range(20))[sample["image_number"]])
    samples.with_images = False
    assert set(samples[25]) == {"attributes", "caption", "image_number", "flipped", "sample"}
    assert torch.equal(sample["attributes"], samples.attributes[sample["image_number"]])


def test_the_first_samples_are_crops_around_the_object():
    samples = RenderedWorld(20, crop_until=20)
    assert samples[20]["image"].shape == (128, 128, 3)
    for sample in (samples[n] for n in range(20)):
        full = samples.image(sample["image_number"]).permute(1, 2, 0)
        assert sample["image"].shape == (64, 64, 3)
        assert sample["image"].std() > full.std() * 0.9, "the object is in it"


def test_every_epoch_shows_every_image_in_its_own_order_and_a_sample_depends_on_its_number_only():
    samples = world(50)
    orders = [[samples[n]["image_number"] for n in range(start, start + 50)] for start in (0, 50, 50_000_000)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    forwards, backwards = (world(30, seed=1, wrong=0.5) for _ in range(2))
    numbers = [0, 7, 31, 95, 1234]
    there, back = [forwards[n] for n in numbers], [backwards[n] for n in reversed(numbers)][::-1]
    assert [sample.pop("attributes").tolist() for sample in there] == [s.pop("attributes").tolist() for s in back]
    assert there == back


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RenderedWorld(10, drop=1.5), "probabilities"),
        (lambda: RenderedWorld(0), "size"),
        (lambda: attributes_from_words(["furry"]), "furry"),
        (lambda: attributes_from_words(["large", "striped", "red", "star", "left", "right"]), "every factor"),
    ],
)
def test_refusals(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


# The tokenizer


def test_every_word_is_one_token_and_other_text_falls_back_to_bytes(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_demo_tokenizer.main()
    assert "use --force" in capsys.readouterr().err and (tmp_path / "vocab.json").read_text() == "{}"
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path), "--force"])
    make_demo_tokenizer.main()
    assert {path.stem for path in tmp_path.iterdir()} == {"vocab", "merges", "words", "tokenizer_config"}

    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in [*world_vocabulary(), "*"]:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    text = caption(STAR)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    # U+65E5 is the bytes e6 97 a5; "qx" is not in any word.
    assert tokenizer.tokenize("qx") == ["q", "x</w>"] and len(tokenizer.tokenize("\u65e5")) == 3
    assert tokenizer.unk_token not in tokenizer.tokenize("Zürich, 12 \u65e5 ~!")
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (start, end, end)
    ids = tokenizer("red " * 50, padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 32 and (ids[0], ids[-1]) == (start, end)
    assert tokenizer("", padding="max_length").input_ids == [start, *[end] * 31]


# Sets


def write_set(folder: Path, *flags: str) -> tuple[set[str], set[str]]:
    """Render into a folder; names and identities in it."""
    render_world.main(["--out", str(folder), "--resolution", "32", *flags])
    with (folder / "captions.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = {path.name: Image.open(path).info["set"] for path in folder.glob("*.png")}
    assert set(images) == {row["file"] for row in rows}
    return set(images), {*images.values(), *(row["set"] for row in rows)}


def test_a_set_is_replaced_as_a_whole_and_has_one_identity(tmp_path: Path, capsys):
    out = tmp_path / "world"
    names, first = write_set(out, "--count", "3")
    assert names == {f"{i:05d}.png" for i in range(3)} and len(first) == 1
    with pytest.raises(SystemExit):
        write_set(out, "--count", "2", "--seed", "1")
    assert "is not empty; use --force" in capsys.readouterr().err and len(list(out.iterdir())) == 4
    names, second = write_set(out, "--count", "2", "--seed", "1", "--force")
    assert len(names) == 2 and len(second) == 1 and first != second
    assert list(tmp_path.iterdir()) == [out], "nothing else is left"
    (out / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        write_set(out, "--count", "1", "--force")
    assert "'mine.txt', which is not of a rendered set" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"


def test_a_set_survives_a_kill_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out = tmp_path / "world"
    out.mkdir()
    _, first = write_set(out, "--count", "3")
    killed = (
        "import os, sys; from pathlib import Path; from scripts import render_world; rename = Path.rename;"
        "Path.rename = lambda path, target: (rename(path, target), os._exit(9)); render_world.main(sys.argv[1:])"
    )
    flags = ["--out", str(out), "--count", "2", "--force"]
    done = subprocess.run(
        [sys.executable, "-c", killed, *flags], cwd=Path(render_world.__file__).parents[1], check=False
    )
    assert done.returncode == 9 and not out.exists()
    with pytest.raises(SystemExit):
        render_world.main(["--out", str(out), "--count", "1"])
    assert "is not empty; use --force" in capsys.readouterr().err
    assert {Image.open(path).info["set"] for path in out.glob("*.png")} == first
    monkeypatch.chdir(out)
    with pytest.raises(SystemExit):
        render_world.main(["--out", ".", "--count", "1", "--force"])
    assert "is the current folder" in capsys.readouterr().err and len(list(out.iterdir())) == 4
