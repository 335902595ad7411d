"""Images of every kind a user may have, in sizes, as tensors and in grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import png_of_size
from PIL import Image, ImageCms

from ldm.files.images import ImageError, _tell, fit, is_image_file, make_grid, open_image, to_pil, to_tensor

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_two(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return image


PALETTE = in_two("P", 0, 1)
PALETTE.putpalette([*RED, *GREEN])
CLEAR, BLACK = (*RED, 0), (0, 0, 0)
PIXELS = {  # what is saved, how, and what its two pixels are
    "grey": (in_two("L", 77, 0), {}, [(77, 77, 77), BLACK]),
    "black and white": (in_two("1", 1, 0), {}, [WHITE, BLACK]),
    "transparent": (in_two("RGBA", CLEAR, (0, 0, 0, 128)), {}, [WHITE, (127, 127, 127)]),
    "transparent grey": (in_two("LA", (0, 51), (0, 255)), {}, [(204, 204, 204), BLACK]),
    "palette": (PALETTE, {}, [RED, GREEN]),
    "a palette's transparent colour": (PALETTE, {"transparency": 0}, [WHITE, GREEN]),
    "a transparent palette": (PALETTE, {"transparency": bytes([255, 0])}, [RED, WHITE]),
    "a transparent colour": (in_two("RGB", RED, BLUE), {"transparency": RED}, [WHITE, BLUE]),
    "a transparent 16-bit grey": (in_two("I;16", 0, 1), {"transparency": 0}, [WHITE, BLACK]),
}


@pytest.mark.parametrize("name", PIXELS)
def test_modes_and_transparency(tmp_path: Path, name: str) -> None:
    image, options, expected = PIXELS[name]
    image.save(tmp_path / "p.png", **options)
    read = open_image(tmp_path / "p.png")
    assert (read.mode, [read.getpixel((x, 0)) for x in (0, 1)]) == ("RGB", expected)
    if expected[0] == WHITE and "transparent" in name:
        assert open_image(tmp_path / "p.png", background=BLUE).getpixel((0, 0)) == BLUE


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for name, dtype in {"a.png": np.uint16, "big-endian.tif": ">u2", "32-bit.tif": np.int32}.items():
        Image.fromarray(values.astype(dtype)).save(tmp_path / name)
        found = np.asarray(open_image(tmp_path / name))
        assert np.array_equal(found, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_numbers_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    for value, problem in ((np.int32(70000), "70000"), (np.float32(0.5), "floating point")):
        Image.fromarray(np.full((2, 2), value)).save(tmp_path / "a.tif")
        with pytest.raises(ImageError, match=rf"a\.tif.*{problem}"):
            open_image(tmp_path / "a.tif")


def test_cmyk_orientation_and_animations(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=100)
    assert np.abs(np.subtract(open_image(tmp_path / "p.jpg").getpixel((8, 8)), RED)).max() <= 3
    upright, exif = noise_image(6, 4), Image.Exif()
    exif[0x0112] = 6  # "turn clockwise by 90 degrees to view"
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "p.png", exif=exif)
    assert Image.open(tmp_path / "p.png").size == (4, 6)
    assert np.array_equal(open_image(tmp_path / "p.png"), upright)
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 257).save(tmp_path / "deep.png", exif=exif)
    assert open_image(tmp_path / "deep.png").size == (4, 6)
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    for name, options in {"a.gif": {}, "a.png": {}, "a.webp": {"lossless": True}}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=40, **options)
        assert open_image(tmp_path / name).getpixel((1, 1)) == RED  # the first frame


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# the same name, with red and green exchanged
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def test_colour_profiles_are_converted_and_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tell.cache_clear()
    colour = Image.new("RGB", (4, 4), (60, 180, 90))
    clear = colour.convert("RGBA")
    clear.putalpha(0)
    images = {"rgb.png": colour, "rgba.png": colour.convert("RGBA"), "palette.png": colour.quantize(2)}
    for name, image in images.items():
        image.save(tmp_path / name, icc_profile=SWAPPED)
        assert np.abs(np.subtract(open_image(tmp_path / name).getpixel((0, 0)), (180, 60, 90))).max() <= 2
    clear.save(tmp_path / "clear.png", icc_profile=SWAPPED)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == WHITE
    noise_image(32, 32).save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(open_image(tmp_path / "a.png"), noise_image(32, 32))
    assert caplog.messages == ["Images with the colour profile 'sRGB built-in' are converted to sRGB."]


def test_a_profile_that_cannot_be_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tell.cache_clear()
    noise_image(8, 8).save(tmp_path / "a.png", icc_profile=b"damaged")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "b.png", icc_profile=SWAPPED)
    assert np.array_equal(open_image(tmp_path / "a.png"), noise_image(8, 8))
    assert open_image(tmp_path / "b.png").size == (8, 8)
    assert ["could not be used" in text or "16-bit" in text for text in caplog.messages] == [True, True]


FOREIGN = {
    "page.png": (b"<!DOCTYPE html><html>", "is a web page, perhaps of a login; log in"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer and not the file itself"),
    "a.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC image, which Pillow does not read; save it as PNG"),
    "clip.mpg": (b"\0\0\x01\xb3\x14\0\xf0\x13" + bytes(100), "is no image that Pillow can read; save it as PNG"),
    "data.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is no image that Pillow can read"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no image that Pillow can read"),
    "text.png": (b"not an image", "is no image that Pillow can read"),
    "empty.png": (b"", "is empty; download it again"),
}


def test_files_that_are_no_images(tmp_path: Path) -> None:
    for name, (content, words) in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert f"'{tmp_path / name}' {words}" in str(caught.value) and "\n" not in str(caught.value)
        assert not is_image_file(tmp_path / name)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    for name in ("cut.jpg", "cut.png"):
        noise_image(64, 64).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
    (tmp_path / "bomb.png").write_bytes(png_of_size(100_000, 100_000))
    problems = {"cut.jpg": "cannot be read", "cut.png": "cannot be read", "bomb.png": "has too many pixels; scale"}
    for name, problem in (problems | {"nowhere.png": "There is no file", ".": "is a folder"}).items():
        with pytest.raises(ImageError, match=problem) as caught:
            open_image(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and "\n" not in message, message
    assert is_image_file(tmp_path / "bomb.png"), "a folder with it must not pass as one without it"


# Sizes


def test_squash_is_one_resize() -> None:
    image = noise_image(50, 30)
    assert np.array_equal(fit(image, 24, 24), image.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(fit(image, 50, 30), image)
    for name, method in {"linear": "BILINEAR", "bilinear": "BILINEAR", "lanczos": "LANCZOS"}.items():
        expected = image.resize((16, 16), Image.Resampling[method])
        assert np.array_equal(fit(image, 16, 16, interpolation=name), expected)


def test_crop_and_pad_keep_proportions_for_any_target() -> None:
    for size, box in {(50, 31): (9, 0, 40, 31), (30, 51): (0, 10, 30, 40)}.items():
        expected = noise_image(*size).crop(box).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(fit(noise_image(*size), 16, 16, "crop"), expected)
    thirds = noise_image(3, 1).resize((300, 100), Image.Resampling.NEAREST)  # three squares of one colour each
    cropped = np.asarray(fit(thirds, 20, 40, "crop"))
    assert cropped.shape == (40, 20, 3) and (cropped == np.asarray(thirds)[50, 150]).all()

    padded = np.asarray(fit(Image.new("RGB", (300, 100), RED), 60, 40, "pad"))
    assert padded.shape == (40, 60, 3)
    assert (padded[10:30] == RED).all() and (padded[:10] == WHITE).all() and (padded[30:] == WHITE).all()
    high = np.asarray(fit(Image.new("RGB", (100, 300), RED), 60, 30, "pad"))
    assert (high[:, 25:35] == RED).all() and (high[:, :25] == WHITE).all() and (high[:, 35:] == WHITE).all()
    assert fit(Image.new("RGB", (5000, 1)), 32, 32, "pad").size == (32, 32)


def test_fit_refuses_what_it_does_not_know() -> None:
    for arguments, problem in (
        ((4, 4, "stretch"), "'stretch'; known: squash, crop, pad"),
        ((4, 4, "pad", "nearest"), "'nearest'; known: linear"),
        ((0, 4), "at most 16384 x 16384, not 0 x 4"),
        ((99_968, 4), "at most 16384 x 16384, not 99968 x 4"),
    ):
        with pytest.raises(ValueError, match=problem):
            fit(noise_image(4, 4), *arguments)


# Tensors


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


def test_grid() -> None:
    pictures = [Image.new("RGB", (6, 4), (i, i, i)) for i in range(1, 6)]
    square = make_grid(pictures)
    assert square.size == (18, 8)
    assert [square.getpixel((6 * c, 4 * r))[0] for r in (0, 1) for c in (0, 1, 2)] == [1, 2, 3, 4, 5, 0]
    assert [make_grid(pictures, columns=n).size for n in (1, 5, 9)] == [(6, 20), (30, 4), (30, 4)]
    assert np.array_equal(make_grid(pictures[:1]), pictures[0])
