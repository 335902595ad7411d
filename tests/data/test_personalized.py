"""Pictures of every kind a user may have, and training samples that are functions of their number."""

import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.personalized import PersonalizedBase
from ldm.files import images
from ldm.files.images import ImageError, fit, make_grid, open_image, to_pil, to_tensor

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NEAREST = Image.Resampling.NEAREST


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def halves(left: tuple[int, int, int], right: tuple[int, int, int], size: tuple[int, int] = (8, 4)) -> Image.Image:
    picture = Image.new("RGB", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        noise_picture(20 + i, 14, seed=i).save(tmp_path / f"{'cadbe'[i]}.png")
    return tmp_path


# --- reading pictures ---------------------------------------------------------------------------------------


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    for mode, value, expected in [("L", 77, (77, 77, 77)), ("1", 1, WHITE)]:
        Image.new(mode, (3, 2), value).save(tmp_path / "p.png")
        picture = open_image(tmp_path / "p.png")
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (3, 2), expected)


def test_transparency_is_composited_not_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (2, 2), (0, 51)).save(tmp_path / "la.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == WHITE
    assert open_image(tmp_path / "clear.png", background=BLUE).getpixel((0, 0)) == BLUE
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)
    assert open_image(tmp_path / "la.png").getpixel((0, 0)) == (204, 204, 204)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "one.png", transparency=0)
    palette.save(tmp_path / "each.png", transparency=bytes([255, 0]))
    colours = {p.stem: [open_image(p).getpixel((x, 0)) for x in (0, 1)] for p in tmp_path.iterdir()}
    assert colours == {"opaque": [RED, GREEN], "one": [WHITE, GREEN], "each": [RED, WHITE]}


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    halves(RED, BLUE).save(tmp_path / "p.png", transparency=RED)
    picture = open_image(tmp_path / "p.png")
    assert (picture.getpixel((0, 0)), picture.getpixel((7, 0))) == (WHITE, BLUE)


@pytest.mark.parametrize("kind", ["png", "big-endian tiff", "32-bit tiff"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    path = tmp_path / ("p.png" if kind == "png" else "p.tif")
    dtype = {"png": np.uint16, "big-endian tiff": ">u2", "32-bit tiff": np.int32}[kind]
    Image.fromarray(values.astype(dtype)).save(path)
    found = np.asarray(open_image(path))
    assert np.array_equal(found, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_numbers_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"int\.tif.*70000"):
        open_image(tmp_path / "int.tif")
    with pytest.raises(ImageError, match=r"float\.tif.*floating point"):
        open_image(tmp_path / "float.tif")


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=100)
    assert np.abs(np.subtract(open_image(tmp_path / "p.jpg").getpixel((8, 8)), RED)).max() <= 3


def test_exif_orientation_turns_the_picture_upright(tmp_path: Path) -> None:
    upright = noise_picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise by 90 degrees to view"
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "p.png", exif=exif)
    assert Image.open(tmp_path / "p.png").size == (4, 6)
    assert np.array_equal(open_image(tmp_path / "p.png"), upright)
    grey = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 257)
    grey.save(tmp_path / "deep.png", exif=exif)
    assert open_image(tmp_path / "deep.png").size == (4, 6)


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=40, **options)
    assert open_image(tmp_path / name).getpixel((1, 1)) == RED


def test_damaged_missing_and_foreign_files(tmp_path: Path) -> None:
    noise_picture(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    noise_picture(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "cut.png", "text.png", "empty.png", "nowhere.png", "."):
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and "\n" not in message, message


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (100_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ImageError, match=r"bomb\.png.*too many pixels; scale it down"):
        open_image(tmp_path / "bomb.png")
    assert images.is_picture(tmp_path / "bomb.png"), "a folder with it must not pass as one without it"


# --- sizes --------------------------------------------------------------------------------------------------


def test_squash_is_one_bicubic_resize() -> None:
    picture = noise_picture(50, 30)
    assert np.array_equal(fit(picture, 24, 24), picture.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(fit(picture, 50, 30), picture)


@pytest.mark.parametrize(("size", "box"), [((50, 31), (9, 0, 40, 31)), ((30, 51), (0, 10, 30, 40))])
def test_crop_takes_the_centre(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    picture = noise_picture(*size)
    expected = picture.crop(box).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(fit(picture, 16, 16, "crop"), expected)


def test_crop_and_pad_keep_proportions_for_any_target() -> None:
    thirds = noise_picture(3, 1).resize((300, 100), NEAREST)  # three squares of one colour each
    cropped = np.asarray(fit(thirds, 20, 40, "crop"))
    middle = np.asarray(thirds)[50, 150]
    assert cropped.shape == (40, 20, 3) and (cropped == middle).all()

    padded = np.asarray(fit(Image.new("RGB", (300, 100), RED), 60, 40, "pad", background=GREEN))
    assert padded.shape == (40, 60, 3)
    assert (padded[10:30] == RED).all() and (padded[:10] == GREEN).all() and (padded[30:] == GREEN).all()
    high = np.asarray(fit(Image.new("RGB", (100, 300), RED), 60, 30, "pad"))
    assert (high[:, 25:35] == RED).all() and (high[:, :25] == WHITE).all() and (high[:, 35:] == WHITE).all()
    assert fit(Image.new("RGB", (5000, 1)), 32, 32, "pad").size == (32, 32)


@pytest.mark.parametrize(
    ("name", "method"),
    [("linear", "BILINEAR"), ("bilinear", "BILINEAR"), ("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")],
)
def test_interpolations(name: str, method: str) -> None:
    picture = noise_picture(40, 40)
    expected = picture.resize((16, 16), Image.Resampling[method])
    assert np.array_equal(fit(picture, 16, 16, interpolation=name), expected)


def test_fit_refuses_what_it_does_not_know() -> None:
    picture = noise_picture(4, 4)
    with pytest.raises(ValueError, match="'stretch'; known: squash, crop, pad"):
        fit(picture, 4, 4, "stretch")
    with pytest.raises(ValueError, match="'nearest'; known: linear"):
        fit(picture, 4, 4, interpolation="nearest")
    with pytest.raises(ValueError, match="0 x 4"):
        fit(picture, 0, 4)


# --- tensors ------------------------------------------------------------------------------------------------


def test_tensor_and_back_for_every_value() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    expected = (values / 127.5 - 1.0).astype(np.float32)  # the reference's formula
    np.testing.assert_allclose(tensor[0].numpy(), expected[..., 0], rtol=0, atol=6e-8)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_pil(tensor), values)


def test_to_pil_clamps_and_rounds() -> None:
    def shown(value: float) -> int:
        return to_pil(torch.full((3, 1, 1), value)).getpixel((0, 0))[0]

    assert [shown(v) for v in (-1.5, -1, 1, 7)] == [0, 0, 255, 255]
    assert [shown((v / 127.5) - 1) for v in (99.6, 100.4, 100.6)] == [100, 100, 101]
    assert to_pil(torch.zeros(3, 4, 6, dtype=torch.bfloat16, requires_grad=True)).size == (6, 4)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\)"):
        to_pil(torch.zeros(1, 3, 4, 4))


def test_grid() -> None:
    pictures = [Image.new("RGB", (6, 4), (i, i, i)) for i in range(1, 6)]
    square = make_grid(pictures)
    assert square.size == (18, 8)
    assert [square.getpixel((6 * c, 4 * r))[0] for r in (0, 1) for c in (0, 1, 2)] == [1, 2, 3, 4, 5, 0]
    assert make_grid(pictures, columns=5).size == (30, 4)
    assert make_grid(pictures, columns=9).size == (30, 4)
    assert make_grid(pictures, columns=1, padding=2).size == (6, 28)
    assert np.array_equal(make_grid(pictures[:1]), pictures[0])
    with pytest.raises(ValueError, match="one size"):
        make_grid([*pictures, noise_picture(4, 4)])
    with pytest.raises(ValueError, match="none"):
        make_grid([])
    with pytest.raises(ValueError, match="0"):
        make_grid(pictures, columns=0)


# --- the data set -------------------------------------------------------------------------------------------


def test_pictures_are_found_by_name_and_squashed(folder: Path) -> None:
    data = PersonalizedBase(folder, size=16)
    assert [path.stem for path in data.paths] == list("abcde") and data.num_pictures == 5
    for i, path in enumerate(data.paths):
        squashed = np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC))
        expected = torch.from_numpy((squashed / 127.5 - 1.0).astype(np.float32)).permute(2, 0, 1)
        torch.testing.assert_close(data.picture(i), expected, rtol=0, atol=6e-8)
        assert torch.equal(data.picture(i, flipped=True), data.picture(i).flip(2))
    with pytest.raises(IndexError):
        data.picture(5)


def test_size_none_and_resizes(folder: Path) -> None:
    assert PersonalizedBase(folder).picture(1).shape == (3, 14, 23)
    picture = open_image(folder / "a.png")
    crop = PersonalizedBase(folder, size=8, center_crop=True)
    assert torch.equal(crop.picture(0), to_tensor(fit(picture, 8, 8, "crop")))
    pad = PersonalizedBase(folder, size=8, resize="pad", interpolation="lanczos")
    assert torch.equal(pad.picture(0), to_tensor(fit(picture, 8, 8, "pad", "lanczos")))


def test_what_is_no_picture_is_skipped_with_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    noise_picture(4, 4).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("teddy")
    (folder / "sub").mkdir()
    noise_picture(4, 4).save(folder / "sub" / "deeper.png")
    data = PersonalizedBase(folder, size=8, resize="crop")
    assert [path.stem for path in data.paths] == list("abcde")
    assert len(caplog.records) == 1
    assert ".DS_Store, .hidden.png, notes.txt, sub" in caplog.text


def test_a_long_list_of_skipped_files_is_shortened(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(30):
        (folder / f"{i}.txt").touch()
    PersonalizedBase(folder, size=8, resize="crop")
    assert "and 20 more" in caplog.text


def test_nothing_is_logged_for_a_clean_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        PersonalizedBase(folder, size=8, resize="crop")
    assert not caplog.records


def test_keys_without_a_meaning_are_named_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        PersonalizedBase(folder, size=8, resize="crop", per_image_tokens=True, mixing_prob=0.5, coarse_class_text="toy")
    assert len(caplog.records) == 1
    assert "per_image_tokens, mixing_prob, coarse_class_text" in caplog.text


def test_one_picture_file(folder: Path) -> None:
    data = PersonalizedBase(folder / "b.png", size=8, repeats=3)
    assert (data.num_pictures, len(data)) == (1, 3)
    assert torch.equal(data.picture(0), PersonalizedBase(folder, size=8).picture(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no data_root.*nowhere"),
        (lambda p: p, "no picture in data_root.*it is empty"),
        (lambda p: (p / "a.txt").write_text("x") and p, r"no picture in data_root.*only a\.txt"),
        (lambda p: (p / "a.txt").write_text("x") and p / "a.txt", r"a\.txt' is a file, but no picture"),
    ],
)
def test_no_pictures(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersonalizedBase(make(tmp_path), size=8)


def test_a_damaged_picture_is_named_before_training(folder: Path) -> None:
    noise_picture(64, 64).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        PersonalizedBase(folder, size=8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "0 x 0"),
        ({"flip_p": 1.5}, "flip_p"),
        ({"repeats": 0}, "repeats"),
        ({"seed": -1}, "seed"),
        ({"set": "trian"}, "trian"),
        ({"interpolation": "cubic"}, "cubic"),
        ({"resize": "stretch"}, "stretch"),
        ({"resize": "pad", "center_crop": True}, "center_crop"),
    ],
)
def test_settings_out_of_range(folder: Path, setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersonalizedBase(folder, **{"size": 8, **setting})


def test_a_sample(folder: Path) -> None:
    data = PersonalizedBase(folder, size=8, placeholder_token="<toy>")
    sample = data[12]
    assert sample["caption"] == "<toy>" and sample["sample"] == 12
    assert sample["image"].shape == (8, 8, 3) and sample["image"].dtype == torch.float32
    expected = data.picture(sample["picture"], sample["flipped"])
    assert torch.equal(sample["image"], expected.permute(1, 2, 0))
    data.with_images = False
    assert data[12] == {key: value for key, value in sample.items() if key != "image"}


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own(folder: Path) -> None:
    data = PersonalizedBase(folder, size=8)
    data.with_images = False
    orders = [tuple(data[n]["picture"] for n in range(5 * e, 5 * e + 5)) for e in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 10


def test_samples_depend_on_seed_and_number_only(folder: Path) -> None:
    def draws(data: PersonalizedBase, numbers: range) -> dict[int, tuple]:
        data.with_images = False
        return {n: (data[n]["picture"], data[n]["flipped"]) for n in numbers}

    forwards = draws(PersonalizedBase(folder, size=8), range(200))
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
        return float(np.mean([data[n]["flipped"] for n in range(1000)]))

    assert share() == pytest.approx(0.5, abs=0.06) and share(flip_p=0.1) == pytest.approx(0.1, abs=0.04)
    assert share(flip_p=0) == 0 and share(flip_p=1) == 1
    assert share(set="validation", flip_p=1) == 0
    assert PersonalizedBase(folder, size=8).flips
    assert not PersonalizedBase(folder, size=8, flip_p=0).flips
    assert not PersonalizedBase(folder, size=8, set="val").flips


def test_length_iteration_and_batches(folder: Path) -> None:
    assert len(PersonalizedBase(folder, size=8, repeats=7)) == 35
    validation = PersonalizedBase(folder, size=8, repeats=7, set="validation")
    assert len(validation) == 5 and len(list(validation)) == 5
    with pytest.raises(IndexError):
        validation[-1]
    batch = next(iter(DataLoader(validation, batch_size=5)))
    assert batch["image"].shape == (5, 8, 8, 3) and batch["flipped"].dtype == torch.bool
    assert batch["caption"] == ["*"] * 5 and sorted(batch["picture"].tolist()) == [0, 1, 2, 3, 4]


def test_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PersonalizedBase(folder, size=8)
    for path in data.paths:
        path.unlink()
    assert data.in_memory and data[3]["image"].shape == (8, 8, 3)


def test_large_folders_are_read_on_demand_within_the_memory_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PersonalizedBase(folder, size=8)
    monkeypatch.setattr("ldm.data.personalized.READ_AHEAD", 2)
    monkeypatch.setattr("ldm.data.personalized.CACHE_BYTES", 2 * 3 * 8 * 8)
    data = PersonalizedBase(folder, size=8)
    assert not data.in_memory
    for _ in range(2):
        for i in range(5):
            assert torch.equal(data.picture(i), expected.picture(i))
    folder.joinpath("e.png").unlink()
    with pytest.raises(ImageError, match=r"no file.*e\.png"):
        data.picture(4)
    assert torch.equal(data.picture(0), expected.picture(0))


@pytest.mark.parametrize(("resize", "told"), [("squash", 1), ("crop", 0), ("pad", 0)])
def test_pictures_that_lose_their_proportions_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resize: str, told: int
) -> None:
    for name in ("a", "b"):
        noise_picture(40, 60).save(tmp_path / f"{name}.png")
    with caplog.at_level("WARNING"):
        PersonalizedBase(tmp_path, size=16, resize=resize)
        PersonalizedBase(tmp_path, size=16, resize=resize, set="val")
    assert caplog.text.count("(40 x 60) is squashed to 16 x 16; data.params.train.params.resize=crop") == told
