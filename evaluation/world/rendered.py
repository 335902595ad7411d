"""A captioned world of rendered pictures whose attributes are known.

One object (position, size, shape, texture, colour) on a plain background. Palette and textures are muted, so that a
diffusion model has to decide them late, after layout and shape: that order is this world's by construction.

Shapes: N pictures, F = 6 factors in the order of `FACTORS`, R pixels a side.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evaluation.world.shapes import BACKGROUNDS, COLOURS, OUTLINES, TEXTURE_CONTRAST, TEXTURES, apply_by_number, srgb

# Centre of the object, in coordinates where the picture is [-1, 1] x [-1, 1] and y points upwards.
CENTRES: dict[str, tuple[float, float]] = {
    "left": (-0.40, 0.0),
    "right": (0.40, 0.0),
    "top": (0.0, 0.40),
    "bottom": (0.0, -0.40),
    "centre": (0.0, 0.0),
}
RADII: dict[str, float] = {"large": 0.50, "small": 0.34}

RESOLUTION = 128  # pixels a side, where nothing else is asked for
CHUNK_PIXELS = 1 << 16  # pictures drawn at a time: few enough to stay in the processor's cache

FACTORS: dict[str, tuple[str, ...]] = {
    "position": tuple(CENTRES),
    "size": tuple(RADII),
    "shape": tuple(OUTLINES),
    "texture": tuple(TEXTURES),
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
}
PREPOSITIONS = {"left": "on the", "right": "on the", "top": "at the", "bottom": "at the", "centre": "in the"}
EXTRA_WORDS = (
    "a an the this that one other same and or not no of on in at with like , . thing object shape colour "
    "texture size background center middle gray picture photo painting drawing image style"
)


def is_held_out(attributes: Tensor) -> Tensor:
    """Whether the (shape, texture, colour) triple is kept out of training.

    Args:
        attributes: long (N, F).

    Returns:
        bool (N,). 18 of the 216 triples are held out, each word of the three factors in three of them.
    """
    columns = list(FACTORS)
    shape, texture, colour = (attributes[:, columns.index(name)] for name in ("shape", "texture", "colour"))
    return (2 * shape + 5 * texture + colour) % 12 == 4


def random_attributes(n: int, seed: int, held_out: bool | None = False) -> Tensor:
    """Independent uniform attributes, long (n, F), over the training triples, the held-out ones, or all (None).

    A larger n continues the rows of a smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([len(words) for words in FACTORS.values()])
    kept = torch.empty(0, len(FACTORS), dtype=torch.long)
    while len(kept) < n:
        drawn = torch.randint(1 << 40, (4096, len(FACTORS)), generator=generator) % choices
        kept = torch.cat([kept, drawn if held_out is None else drawn[is_held_out(drawn) == held_out]])
    return kept[:n]


def attributes_from_words(words: Iterable[str]) -> Tensor:
    """Attributes, long (F,), from one word of every factor in any order, e.g. large striped red star ..."""
    words = list(words)
    known = {word: name for name, values in FACTORS.items() for word in values}
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"unknown words {unknown}; choose from {FACTORS}")
    chosen = {known[word]: word for word in words}
    if len(words) != len(FACTORS) or len(chosen) != len(FACTORS):
        raise ValueError(f"need one word of every factor {list(FACTORS)}, got {words}")
    return torch.tensor([values.index(chosen[name]) for name, values in FACTORS.items()])


def _uniform(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers in [-1, 1), double (N, count); row n depends on seeds[n] only (splitmix64 counters)."""
    x = (seeds.long()[:, None] * count + torch.arange(1, count + 1)) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (x & 0xFFFFFF).double() / (1 << 23) - 1


def _table(values: dict[str, float] | dict[str, tuple[float, ...]]) -> Tensor:
    return torch.tensor(list(values.values()), dtype=torch.double)


def _render(attributes: Tensor, seeds: Tensor, resolution: int) -> Tensor:
    """`render` for one chunk.

    The numbers of each picture are doubles, rounded to float before they meet the pixels: the last bit of a
    vectorised cosine or power depends on its place in the batch.
    """
    position, size, shape, texture, colour, background = attributes.unbind(1)
    jitter = _uniform(seeds, 10)  # (N, 10) in [-1, 1)
    centre = _table(CENTRES)[position] + 0.035 * jitter[:, 0:2]
    radius = _table(RADII)[size] * (1 + 0.05 * jitter[:, 2])
    angle = 0.12 * jitter[:, 3]

    def column(values: Tensor) -> Tensor:
        return values.float()[:, None, None]  # (N, 1, 1)

    # The object's coordinates: shift, turn, divide by the radius.
    axis = (torch.arange(resolution) + 0.5) * (2 / resolution) - 1
    dx, dy = axis[None, None, :] - column(centre[:, 0]), -axis[None, :, None] - column(centre[:, 1])
    cos, sin = column(angle.cos() / radius), column(angle.sin() / radius)
    x, y = dx * cos + dy * sin, dy * cos - dx * sin  # (N, R, R)
    pixel = column((2 / resolution) / radius)
    # Larger objects have a slightly larger texture. A period is 7 to 9 of 64 pixels.
    period = column((0.12 + 0.30 * radius) / radius * (1 + 0.05 * jitter[:, 4]))
    shift = 0.15 * period
    shifted = x + shift * column(jitter[:, 5]), y + shift * column(jitter[:, 6])
    tone = apply_by_number(TEXTURES.values(), texture, *shifted, period, pixel)
    outline = apply_by_number(OUTLINES.values(), shape, x, y)
    inside = (0.5 - outline / pixel).clamp_(0, 1)

    lightness, chroma, hue = _table(COLOURS)[colour].unbind(1)
    lightness, hue = lightness + 0.01 * jitter[:, 7], hue.deg2rad() + 0.06 * jitter[:, 8]
    dark = srgb(lightness - TEXTURE_CONTRAST / 2, chroma, hue)
    light = srgb(lightness + TEXTURE_CONTRAST / 2, chroma, hue)
    lightness, chroma, hue = _table(BACKGROUNDS)[background].unbind(1)
    ground = srgb(lightness + 0.01 * jitter[:, 9], chroma, hue.deg2rad())
    dark, light, ground = (rgb.float()[:, :, None, None] for rgb in (dark, light, ground))
    painted = dark + (light - dark) * tone[:, None]  # (N, 3, R, R)
    return ground + (painted - ground) * inside[:, None]


def render(attributes: Tensor, seeds: Sequence[int] | Tensor, resolution: int = RESOLUTION) -> Tensor:
    """Draw pictures; exact place, size, angle, texture phase and hue vary a little with the seed.

    Args:
        attributes: long (N, F), columns in the order of `FACTORS`.
        seeds: N integers; picture n depends on its own row and seed only, not on the batch.
        resolution: R, pixels a side.

    Returns:
        float32 (N, 3, R, R) in [-1, 1], sRGB.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.long)
    if attributes.shape != (len(seeds), len(FACTORS)):
        raise ValueError(f"need attributes ({len(seeds)}, {len(FACTORS)}), got {tuple(attributes.shape)}")
    step = max(1, CHUNK_PIXELS // resolution**2)
    chunks = [_render(attributes[i : i + step], seeds[i : i + step], resolution) for i in range(0, len(seeds), step)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, resolution, resolution)


def caption(
    attributes_row: Tensor, rng: np.random.Generator | None = None, drop: float = 0.0, wrong: float = 0.0
) -> str:
    """Describe one row of attributes, e.g. "a large striped red star on the left on a navy background".

    Args:
        attributes_row: long (F,).
        rng: source of the omissions and errors; None gives the full true caption.
        drop: probability that a part is left out (the shape becomes "thing"), for each part independently.
        wrong: probability that a word is replaced by another one of its factor, for each word independently.
    """
    words = {}
    for (name, values), index in zip(FACTORS.items(), attributes_row.tolist(), strict=True):
        if rng is not None and rng.random() < wrong:
            index = (index + rng.integers(1, len(values))) % len(values)
        kept = rng is None or rng.random() >= drop
        words[name] = values[index] if kept else ""
    return sentence(words)


def sentence(words: Mapping[str, str]) -> str:
    """A caption from one word of every factor; a part whose word is "" is left out."""
    parts = ["a", *filter(None, (words["size"], words["texture"], words["colour"])), words["shape"] or "thing"]
    if words["position"]:
        parts += [PREPOSITIONS[words["position"]], words["position"]]
    if words["background"]:
        parts += ["on a", words["background"], "background"]
    return " ".join(parts)


def world_vocabulary() -> list[str]:
    """Every word a caption can contain, and a few more that prompts for this world may use; sorted."""
    words = {word for values in FACTORS.values() for word in values}
    for phrase in (*PREPOSITIONS.values(), EXTRA_WORDS):
        words.update(phrase.split())
    return sorted(words)


class RenderedWorld(Dataset):
    """Captioned pictures, drawn when they are asked for.

    Sample numbers run on past the length: epoch n // size shows all pictures in a fixed order of its own, and the
    omissions and errors of sample n's caption are a function of (seed, n) only. With `with_images` set to False
    the samples come without pictures.

    Args:
        size: number of different pictures.
        seed: chooses attributes, pictures, order and captions.
        resolution: R, pixels a side.
        held_out: (shape, texture, colour) triples that are kept out of training (True), the others, or all (None).
        empty, drop, wrong: probabilities: that the whole caption is empty; see `caption`.
        errors_from: sample number from which captions have omissions and errors.
        crop_until: samples before this number show only `crop` x `crop` pixels around the object.
        repeats: epochs that make up the length.
    """

    flips = False  # left and right have a meaning
    in_memory = True

    def __init__(
        self,
        size: int = 50000,
        seed: int = 0,
        resolution: int = RESOLUTION,
        held_out: bool | None = False,
        empty: float = 0.1,
        drop: float = 0.1,
        wrong: float = 0.0,
        errors_from: int = 0,
        crop_until: int = 0,
        crop: int = RESOLUTION // 2,
        repeats: int = 1,
    ) -> None:
        if size < 1 or repeats < 1 or seed < 0:
            raise ValueError(f"need size >= 1, repeats >= 1, seed >= 0; got {size}, {repeats}, {seed}")
        for name, probability in {"empty": empty, "drop": drop, "wrong": wrong}.items():
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is a probability, got {probability}")
        self.num_pictures, self.seed, self.resolution, self.repeats = size, seed, resolution, repeats
        self.empty, self.drop, self.wrong, self.errors_from = empty, drop, wrong, errors_from
        self.crop_until, self.crop, self.with_images = crop_until, crop, True
        self.attributes = random_attributes(size, seed, held_out)  # long (size, F)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_pictures * self.repeats

    def pictures(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Pictures, float32 (N, 3, R, R) in [-1, 1], for N picture numbers below `num_pictures`."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        if ((indices < 0) | (indices >= self.num_pictures)).any():
            raise IndexError(f"picture numbers run from 0 to {self.num_pictures - 1}, got {indices.tolist()}")
        return render(self.attributes[indices], (self.seed << 32) + indices, self.resolution)

    def picture(self, i: int, flipped: bool = False) -> Tensor:
        """Picture number i, float32 (3, R, R) in [-1, 1]."""
        if flipped:
            raise ValueError("a picture of this world cannot be flipped: its caption says left or right")
        return self.pictures([i])[0]

    def picture_number(self, n: int) -> int:
        """The picture that sample n shows."""
        if n < 0:
            raise IndexError(f"sample number {n} is negative")
        epoch, place = divmod(n, self.num_pictures)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_pictures)
        return int(self._epoch[1][place])

    def __getitem__(self, n: int) -> dict[str, object]:
        """Sample n >= 0: image float32 (R, R, 3) in [-1, 1], attributes (F,), caption, picture, flipped, sample."""
        i = self.picture_number(n)
        rng = np.random.default_rng((self.seed, n, 1))
        errors = (self.drop, self.wrong) if n >= self.errors_from else (0.0, 0.0)
        text = "" if rng.random() < self.empty else caption(self.attributes[i], rng, *errors)
        sample: dict[str, object] = {"caption": text, "picture": i, "flipped": False, "sample": n}
        sample["attributes"] = self.attributes[i]
        if self.with_images:
            sample["image"] = self._view(n, i, self.picture(i))
        return sample

    def _view(self, n: int, i: int, picture: Tensor) -> Tensor:
        """What sample n shows of picture i (3, R, R): all of it, or a part around the object; (·, ·, 3)."""
        if n < self.crop_until:
            position = FACTORS["position"][self.attributes[i, 0]]
            x, y = CENTRES[position]
            middle = np.array([(1 - y) / 2, (1 + x) / 2]) * self.resolution  # row, column
            shift = np.random.default_rng((self.seed, n, 2)).uniform(-0.25, 0.25, 2) * self.crop
            corner = np.clip(middle + shift - self.crop / 2, 0, self.resolution - self.crop).astype(int)
            picture = picture[:, corner[0] : corner[0] + self.crop, corner[1] : corner[1] + self.crop]
        return picture.permute(1, 2, 0).contiguous()

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, object]]:
        """Several samples at once, which `DataLoader` asks for: the pictures are drawn together."""
        with_images, self.with_images = self.with_images, False
        samples = [self[n] for n in numbers]
        self.with_images = with_images
        if with_images:
            pictures = self.pictures([sample["picture"] for sample in samples])
            for sample, picture in zip(samples, pictures, strict=True):
                sample["image"] = self._view(sample["sample"], sample["picture"], picture)
        return samples
