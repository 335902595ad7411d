"""Training samples from the images of a folder: functions of their number, and nothing else."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.personalized import PersonalizedBase, find_images
from ldm.files.images import ImageError, fit, open_image, to_tensor


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def jpeg() -> bytes:
    stream = io.BytesIO()
    noise_image(64, 64).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        noise_image(20 + i, 14, seed=i).save(tmp_path / f"{'cadbe'[i]}.png")
    return tmp_path


def test_pictures_are_found_by_name_and_squashed(folder: Path) -> None:
    data = PersonalizedBase(folder, size=16)
    assert [path.stem for path in data.paths] == list("abcde") and data.num_images == 5
    for i, path in enumerate(data.paths):
        squashed = np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC))
        expected = torch.from_numpy((squashed / 127.5 - 1.0).astype(np.float32)).permute(2, 0, 1)
        torch.testing.assert_close(data.image(i), expected, rtol=0, atol=6e-8)
        assert torch.equal(data.image(i, flipped=True), data.image(i).flip(2))
    with pytest.raises(IndexError):
        data.image(5)


def test_size_none_and_resizes(folder: Path) -> None:
    assert PersonalizedBase(folder).image(1).shape == (3, 14, 23)
    for resize, settings in (("crop", {"center_crop": True}), ("pad", {"resize": "pad", "interpolation": "lanczos"})):
        data = PersonalizedBase(folder, size=8, **settings)
        fitted = fit(open_image(folder / "a.png"), 8, 8, resize, data.interpolation)
        assert torch.equal(data.image(0), to_tensor(fitted))
    one = PersonalizedBase(folder / "b.png", size=8, repeats=3)
    assert (one.num_images, len(one)) == (1, 3)
    assert torch.equal(one.image(0), PersonalizedBase(folder, size=8).image(1))


def test_what_is_no_image_is_skipped_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    find_images(folder)
    assert not caplog.messages
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    noise_image(4, 4).save(folder / ".hidden.png")
    (folder / "clip.mpg").write_bytes(b"\0\0\x01\xb3\x14\0\xf0\x13" + bytes(100))
    (folder / "notes.txt").write_text("teddy")
    (folder / "sub").mkdir()
    noise_image(4, 4).save(folder / "sub" / "deeper.png")
    assert [path.stem for path in find_images(folder)] == list("abcde")
    assert caplog.messages == [
        f"Skipped in '{folder}', as they are no images: .DS_Store, .hidden.png, clip.mpg, notes.txt, sub"
    ]
    caplog.clear()
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for i in range(30):
        (folder / f"{i}.txt").touch()
    find_images(folder)
    assert "save them as PNG or JPEG to use them: HEIC images phone.HEIC" in caplog.messages[0]
    assert "and 25 more" in caplog.messages[1] and "HEIC" not in caplog.messages[1]


def test_finding_images_takes_time_in_proportion_to_their_number(tmp_path: Path) -> None:
    """With the square of the number, 8000 took ten seconds."""
    noise_image(4, 4).save(tmp_path / "a.png")
    for i in range(8000):
        os.link(tmp_path / "a.png", tmp_path / f"{i}.png")
    started = time.process_time()
    assert len(find_images(tmp_path)) == 8001
    assert time.process_time() - started < 4


@pytest.mark.skipif(os.name != "posix", reason="names of files are text there")
def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme")
    os.mkdir(folder)
    with pytest.raises(ValueError, match=r"The name of data_root '.*na\?me' is not UTF-8; rename the folder"):
        find_images(folder)


@pytest.mark.parametrize(
    ("place", "files", "message"),
    [
        ("nowhere", {}, r"data_root '.*nowhere' \(there is no such folder\)"),
        ("", {}, "no image in data_root.*it is empty"),
        ("", {"a.txt": b"x"}, r"no image in data_root.*only a\.txt"),
        ("a.txt", {"a.txt": b"x"}, r"a\.txt' is no image that Pillow can read"),
        ("", {"cut.jpg": jpeg()[:900]}, r"cut\.jpg' cannot be read"),
    ],
)
def test_no_or_damaged_pictures(tmp_path: Path, place: str, files: dict[str, bytes], message: str) -> None:
    """Found before a model is loaded."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PersonalizedBase(tmp_path / place, size=8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "0 x 0"),
        ({"flip_p": 1.5}, "flip_p"),
        ({"repeats": 0}, "repeats"),
        ({"set": "trian"}, "trian"),
        ({"interpolation": "cubic"}, "cubic"),
        ({"resize": "stretch"}, "stretch"),
        ({"resize": "pad", "center_crop": True}, "center_crop"),
        ({"templates": []}, "templates must be texts"),
        ({"templates": [5]}, "templates must be texts"),
    ],
)
def test_settings_out_of_range(folder: Path, setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersonalizedBase(folder, **{"size": 8, **setting})


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("object", 27, {"a photo of my *", "the photo of a *", "a cropped photo of the *", "a rendition of a *"}),
        ("style", 19, {"a picture in the style of *", "a close-up painting in the style of *"}),
        ("textual-inversion", 81, {"an illustration of the weird *", "a depiction of one *", "a rendering of a *"}),
        ("a * style", 1, {"a * style"}),
    ],
)
def test_captions_are_drawn_from_a_set(folder: Path, name: str, count: int, some: set[str]) -> None:
    data = PersonalizedBase(folder, templates=name.replace("*", "{}"))
    drawn = {data.caption(n) for n in range(40 * count)}
    assert len(data.templates) == count and some <= drawn == {text.replace("{}", "*") for text in data.templates}


def test_a_sample(folder: Path) -> None:
    data = PersonalizedBase(folder, size=8, placeholder_token="<toy>")
    sample = data[12]
    assert sample["caption"] == "<toy>" and sample["sample"] == 12
    assert sample["image"].shape == (8, 8, 3) and sample["image"].dtype == torch.float32
    expected = data.image(sample["image_number"], sample["flipped"])
    assert torch.equal(sample["image"], expected.permute(1, 2, 0))
    data.with_images = False
    assert data[12] == {key: value for key, value in sample.items() if key != "image"}


def test_samples_depend_on_seed_and_number_only(folder: Path) -> None:
    def draws(data: PersonalizedBase, numbers: range) -> dict[int, tuple]:
        data.with_images = False
        return {n: (data[n]["image_number"], data[n]["flipped"]) for n in numbers}

    forwards = draws(PersonalizedBase(folder, size=8), range(200))
    orders = [tuple(forwards[n][0] for n in range(5 * epoch, 5 * epoch + 5)) for epoch in range(40)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders), "an epoch shows every picture once"
    assert len(set(orders)) > 10, "in an order of its own"
    np.random.seed(1)
    torch.manual_seed(1)
    backwards = draws(PersonalizedBase(folder, size=8, repeats=2), range(199, -1, -1))
    assert forwards == backwards
    other = draws(PersonalizedBase(folder, size=8, seed=24), range(200))
    assert sum(forwards[n] == other[n] for n in range(200)) < 60
    assert PersonalizedBase(folder, size=8)[10**12]["sample"] == 10**12, "numbers may exceed the length"


def test_flips(folder: Path) -> None:
    def share(**settings: object) -> float:
        data = PersonalizedBase(folder, size=8, **settings)
        data.with_images = False
        flipped = [data[n]["flipped"] for n in range(1000)]
        assert data.flips == any(flipped)
        return float(np.mean(flipped))

    assert share() == pytest.approx(0.5, abs=0.06) and share(flip_p=0.1) == pytest.approx(0.1, abs=0.04)
    assert share(flip_p=0) == 0 and share(flip_p=1) == 1
    assert share(set="validation", flip_p=1) == share(set="val") == 0


def test_length_iteration_and_batches(folder: Path) -> None:
    """Files are read once."""
    assert len(PersonalizedBase(folder, size=8, repeats=7)) == 35
    validation = PersonalizedBase(folder, size=8, repeats=7, set="validation")
    for path in validation.paths:
        path.unlink()
    assert validation.in_memory and len(validation) == 5 and len(list(validation)) == 5
    batch = next(iter(DataLoader(validation, batch_size=5)))
    assert batch["image"].shape == (5, 8, 8, 3) and batch["flipped"].dtype == torch.bool
    assert batch["caption"] == ["*"] * 5 and sorted(batch["image_number"].tolist()) == [0, 1, 2, 3, 4]


def test_large_folders_are_read_on_demand_within_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PersonalizedBase(folder, size=8)
    monkeypatch.setattr("ldm.data.personalized.READ_AHEAD", 2)
    monkeypatch.setattr("ldm.data.personalized.CACHE_BYTES", 2 * 3 * 8 * 8)
    data = PersonalizedBase(folder, size=8)
    assert not data.in_memory
    for _ in range(2):
        for i in range(5):
            assert torch.equal(data.image(i), expected.image(i))
    folder.joinpath("e.png").unlink()
    with pytest.raises(ImageError, match=r"no file.*e\.png"):
        data.image(4)
    assert torch.equal(data.image(0), expected.image(0))


def test_pictures_that_lose_their_proportions_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        noise_image(40, 60).save(tmp_path / f"{name}.png")
    for resize, split in (("crop", "train"), ("pad", "train"), ("squash", "val"), ("squash", "train")):
        assert not caplog.messages
        PersonalizedBase(tmp_path, size=16, resize=resize, set=split)
    (line,) = caplog.messages
    assert "(40 x 60) is squashed to 16 x 16; data.params.train.params.resize=crop" in line
