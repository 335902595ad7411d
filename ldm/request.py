"""The request for an image: one dataclass that checks itself.

Flags, the YAML of `--prompts`, the record in a PNG and the arguments of `ldm.generate.main` all become a `Request`.
Nothing heavy is imported here, so that a mistake is reported before PyTorch is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from omegaconf import DictConfig

PLACEHOLDER = "*"
SAMPLERS = {"ddim": "leading", "plms": "leading", "dpmpp_2m": "trailing"}  # and where their timesteps are
SPACINGS = ("leading", "trailing")
# Two fifths of the default's U-Net calls. What that costs in quality: scripts/steps.py, not measured yet.
FAST: dict[str, Any] = {"sampler": "dpmpp_2m", "ddim_steps": 20}
PRESETS = ("content", "layout", "material", "style")
CHOICES: dict[str, tuple[object, ...]] = {
    "sampler": tuple(SAMPLERS),
    "spacing": (None, *SPACINGS),
    "resize": ("crop", "pad", "squash"),
    "preset": (None, *PRESETS),
}
CHOICES |= {"any_base": (False, True), "legacy_word_tokens": (False, True)}
MAX_SCALE = 1000  # guidance beyond it leaves nothing of an image; useful scales are below 30
RANGES = {  # least and greatest value of each number
    "strength": (0, 1),
    "ddim_steps": (1, 1000),
    "ddim_eta": (0, 1),
    "scale": (0, MAX_SCALE),
    "rescale": (0, 1),
    "seed": (0, 2**63 - 1),
    "n_samples": (1, 4096),
    "n_iter": (1, 1_000_000),
    "n_rows": (0, 1_000_000),
    "truncation": (0, 128),
    "height": (1, 1 << 14),
    "width": (1, 1 << 14),
}
MAX_PLACEHOLDER = 100  # characters
MAX_PROMPT = 1 << 17  # characters; some hundred are read, and for a million the tokenizer needs ten seconds
MAX_CONCEPTS = 100  # a prompt has room for 75 tokens

Words = Sequence["str | int | None"]
WORDS_OF = {"stage": "prospect_words", "layer": "layer_words"}
# Letters and digits of scripts that put spaces between words; Thai, Chinese, Japanese, … do not.
_LETTER = r"[^\W\u0e00-\U0010ffff]"


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that a request is checked against; by default Stable Diffusion v1's.

    Args:
        num_stages: S, entries of `prospect_words`.
        size_unit: pixels that height and width must be multiples of.
        factor: pixels for each latent element, f.
        height, width: pixels of an image where the request gives none; so is `scale`.
        placeholder: of a concept without a name; None: the model takes no concepts.
        token_width: D of the text transformer, which concepts must have.
        num_layers: cross-attention layers of the U-Net, entries of `layer_words`; None: not known before it is built.
    """

    num_stages: int = 10
    size_unit: int = 64
    factor: int = 8
    height: int = 512
    width: int = 512
    scale: float = 10.0
    placeholder: str | None = PLACEHOLDER
    token_width: int = 768
    num_layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that an image is asked for. Numbers of NumPy become Python's, paths get their `~` expanded.

    Args:
        prompt: in it, * stands for the concept or for the entries of `prospect_words`
        prospect_words: one entry for each stage, the end of sampling (low noise) first: a text that replaces *, the
            number of the stage whose learned token does, or None for the prompt as it is
        layer_words: the same as prospect_words for each cross-attention layer of the U-Net (P+), in order of execution
        preset: what the first concept in the prompt gives, the prompt the rest: content, layout, material or style
        negative_prompt: plain text that guidance leads away from, in all stages
        content_dir: image to edit: a file, or one that Pillow has opened; None generates from noise
        strength: how much of the content image is given up, 0 (nothing) to 1 (all)
        resize: how the content image is brought to width x height: crop, pad or squash
        ddim_steps: sampling steps, 1 to 1000
        ddim_eta: 0 is deterministic DDIM, 1 is as random as DDPM
        scale: of guidance, 0 to 1000, or one for each stage, the end first; 1 is none, in half the time (the model's)
        rescale: share of the contrast which guidance adds that is taken back, 0 to 1 (Lin et al. 2024)
        sampler: ddim, plms or dpmpp_2m (DPM-Solver++)
        spacing: of timesteps: leading, or trailing, which begins with pure noise (the sampler's; dpmpp_2m: trailing)
        seed: of the first image; image i has seed + i, and is the same image when it is made alone
        n_samples: images in a batch
        n_iter: batches
        n_rows: images in a row of the grid; 0 for as square as possible
        truncation: hidden values of a NeTI concept that are kept, 0 to 128 (all); few are easier to edit, many closer
        height: pixels (the model's; Stable Diffusion: 512)
        width: pixels (the model's; Stable Diffusion: 512)
        concepts: learned embeddings, {placeholder: file}, for this request only
        any_base: use concepts that were learned for another base model, too
        legacy_word_tokens: read prospect_words as the reference does: only the first piece of each word

    Raises:
        ValueError: a value of a wrong type, an unknown choice or a number out of range; one sentence with the remedy.
    """

    prompt: str = ""
    prospect_words: Words | None = None
    layer_words: Words | None = None
    preset: str | None = None
    negative_prompt: str = ""
    content_dir: Any = None
    strength: float = 0.5
    resize: str = "crop"
    ddim_steps: int = 50
    ddim_eta: float = 0.0
    scale: float | Sequence[float] | None = None
    rescale: float = 0.0
    sampler: str = "ddim"
    spacing: str | None = None
    seed: int = 42
    n_samples: int = 1
    n_iter: int = 1
    n_rows: int = 0
    truncation: int | None = None
    height: int | None = None
    width: int | None = None
    concepts: Mapping[str, Any] | None = None
    any_base: bool = False
    legacy_word_tokens: bool = False

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        given = [name for name in ("prospect_words", "layer_words", "preset") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one.")
        for part, name in WORDS_OF.items():
            if name in given:
                self._set(name, tuple(check_words(getattr(self, name), part=part)))
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not any(isinstance(value, type(choice)) and value == choice for choice in known):
                listed = ", ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"Unknown {name} {shown(value)}; there are {listed}.")
        for name, limits in RANGES.items():
            value, field = getattr(self, name), self.__dataclass_fields__[name]
            if name == "scale" and _is_list(value):
                self._set(name, tuple(read_number(f"scale[{i}]", each, *limits) for i, each in enumerate(value)))
            elif value is not None or field.default is not None:
                self._set(name, read_number(name, value, *limits, whole=str(field.type).startswith("int")))
        last, highest = self.seed + self.n_samples * self.n_iter - 1, RANGES["seed"][1]
        if last > highest:
            raise ValueError(f"seed + i of the last image is {last}, beyond {highest}; give a smaller seed.")
        self._set("content_dir", _content(self.content_dir))
        self._set("concepts", _concepts(self.concepts or {}))
        check_negative_prompt(self.negative_prompt, self.concepts or {})
        if self.sampler != "ddim" and self.ddim_eta != 0:
            raise ValueError(f"{self.sampler} is deterministic: ddim_eta must be 0, not {self.ddim_eta}; use DDIM.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def for_model(self, facts: ModelFacts) -> Request:
        """Return the request with the model's own size and guidance, and the sampler's spacing, where it gives none.

        Raises:
            ValueError: the model cannot do it; one sentence with the nearest usable value.
        """
        own = {name: getattr(facts, name) for name in ("height", "width", "scale") if getattr(self, name) is None}
        request = replace(self, **own, spacing=self.spacing or SAMPLERS[self.sampler])
        for name, size in zip(("height", "width"), request.size, strict=True):
            if size % facts.size_unit:
                nearest = max(facts.size_unit, round(size / facts.size_unit) * facts.size_unit)
                multiple = f"a multiple of {facts.size_unit} for this model"
                raise ValueError(f"{name} must be {multiple}, not {size}; nearest: {nearest}.")
        if request.prospect_words is not None:
            check_words(request.prospect_words, facts.num_stages)
        if request.layer_words is not None and facts.num_layers is not None:
            check_words(request.layer_words, facts.num_layers, "layer")
        if isinstance(request.scale, tuple):
            _check_length("scale", request.scale, facts.num_stages)
        if request.concepts and facts.placeholder is None:
            raise ValueError("This model has no personalization_config, so concepts cannot be loaded into it.")
        return request

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of a request that `for_model` returned."""
        assert self.height is not None and self.width is not None, "call for_model first"
        return self.height, self.width

    @property
    def guidance_scale(self) -> float | Sequence[float]:
        """`scale`, of a request that `for_model` returned."""
        assert self.scale is not None, "call for_model first"
        return self.scale

    @property
    def is_guided(self) -> bool:
        """True where a stage has a guidance scale other than 1."""
        return any(scale != 1 for scale in (self.scale if isinstance(self.scale, tuple) else (self.scale,)))

    @property
    def denoising_steps(self) -> int:
        """Steps that are made: all of them from noise, strength · ddim_steps without its fraction for a content image.

        The product is decimal, 0.29 of 100 is 29: the reference's `int(strength * ddim_steps)` gives 28, because the
        binary number nearest to 0.29 is less.
        """
        return self.ddim_steps if self.content_dir is None else int(Decimal(str(self.strength)) * self.ddim_steps)

    @property
    def noised_entry(self) -> int:
        """Entry of the schedule that a content image is noised to.

        Leading, that is one above the entry that is denoised first, as in the reference; trailing, that entry itself.
        """
        return self.denoising_steps - (self.spacing == "trailing")


def model_facts(config: DictConfig) -> ModelFacts:
    """Read the facts of a model from its configuration; nothing is built.

    The size is the latents' `image_size`, else the first stage's `resolution`; the guidance scale is the image
    logger's. What is missing or unreadable is Stable Diffusion's.
    """
    from omegaconf import OmegaConf

    def read(key: str) -> Any:
        return OmegaConf.select(config, key, throw_on_resolution_failure=False)

    def whole(key: str, default: int) -> int:
        value = read(key)
        return value if type(value) is int and value > 0 else default

    def halvings(key: str, default: int) -> int:
        multipliers = read(key)
        return len(multipliers) - 1 if isinstance(multipliers, Sequence) and multipliers else default

    params, first_stage = "model.params", "model.params.first_stage_config.params.ddconfig"
    factor = 2 ** halvings(f"{first_stage}.ch_mult", 3)
    size = whole(f"{params}.image_size", 0) * factor or whole(f"{first_stage}.resolution", 512)
    scale = read("lightning.callbacks.image_logger.params.log_images_kwargs.scale")
    placeholders = read(f"{params}.personalization_config.params.placeholder_strings") or PLACEHOLDER
    placeholder = placeholders if isinstance(placeholders, str) else str(placeholders[0])
    return ModelFacts(
        num_stages=whole(f"{params}.prospect_stages", 10),
        size_unit=factor * 2 ** halvings(f"{params}.unet_config.params.channel_mult", 3),
        factor=factor,
        height=size,
        width=size,
        scale=float(scale) if isinstance(scale, (int, float)) else 10.0,
        placeholder=placeholder if read(f"{params}.personalization_config") is not None else None,
        token_width=whole(f"{params}.cond_stage_config.params.text_config.hidden_size", 768),
    )


# --- texts and placeholders ------------------------------------------------------------------------------------


def check_prompt(prompt: object, what: str = "A prompt") -> None:
    """Raise `ValueError` unless `prompt` is a text of bearable length that can be written down."""
    if not isinstance(prompt, str):
        raise ValueError(f"{what} must be a text, not {shown(prompt)}; in YAML, put it in quotes.")
    if re.search("[\ud800-\udfff]", prompt):
        raise ValueError(f"{what} has bytes that are no text ({prompt[:40]!a}); write it in UTF-8.")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"{what} has {len(prompt)} characters, of which only the first are read; shorten it.")


def check_placeholder(placeholder: Any) -> None:
    """Raise `ValueError` unless prompts can be cut at `placeholder`: `*` is replaced wherever it stands."""
    is_text = isinstance(placeholder, str) and placeholder.strip() and placeholder.isprintable()
    if not is_text or len(placeholder) > MAX_PLACEHOLDER:
        wanted = f"a visible text of at most {MAX_PLACEHOLDER} characters, such as '*'"
        raise ValueError(f"A placeholder must be {wanted}, not {shown(placeholder)}.")
    if PLACEHOLDER in placeholder and placeholder != PLACEHOLDER:
        raise ValueError(f"The placeholder '{placeholder}' must not contain '*', which is one itself; take '<star>'.")


def check_negative_prompt(text: str, placeholders: Iterable[str]) -> None:
    """Raise `ValueError` unless `text` is plain: learned tokens have no place in what guidance leads away from."""
    check_prompt(text, "negative_prompt")
    if found := placeholder_pattern([PLACEHOLDER, *placeholders]).search(text):
        raise ValueError(f"negative_prompt has the placeholder '{found[0]}'; it must be plain text, so leave it out.")


def check_words(words: object, count: int | None = None, part: str = "stage") -> list[str | int | None]:
    """Return `words` as a checked list.

    Args:
        count: stages or layers of the model; None leaves the number of entries, and what they may name, for later.
        part: `layer` for a list of one entry for each U-Net layer.

    Raises:
        ValueError: not a list of `count` entries, or an entry that is neither a text, a number below `count`, nor None.
    """
    name = WORDS_OF[part]
    if not _is_list(words):
        raise ValueError(f"{name} must be a list of one entry for each {part}, not {shown(words)}.")
    if count is not None:
        _check_length(name, words, count, part)
    return [_word(f"{name}[{i}]", word, count, part) for i, word in enumerate(words)]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _check_length(name: str, entries: Sequence[object], count: int, part: str = "stage") -> None:
    if len(entries) != count:
        ends = "the end of generation, the last one its start" if part == "stage" else "the first layer"
        raise ValueError(f"{name} has {len(entries)} entries, but this model has {count} {part}s; entry 0 is {ends}.")


def _word(name: str, word: Any, count: int | None, part: str) -> str | int | None:
    if word is None or isinstance(word, str):
        check_prompt(word or "", name)
        return word
    is_number = isinstance(word, Integral) and not isinstance(word, bool)
    if not is_number or (count is not None and not 0 <= word < count):
        wanted = f"a {part} number" + ("" if count is None else f" in 0..{count - 1}")
        raise ValueError(f"{name} must be a text, {wanted}, or None, not {shown(word)}.")
    return int(word)


def placeholder_pattern(placeholders: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern with one group that matches any of `placeholders`, the longest that fits.

    One that begins or ends with a letter or digit is not found inside a longer word: `star` is not in `starfish`.
    """
    found = sorted(set(placeholders), key=len, reverse=True)
    return re.compile("(" + "|".join(_whole_word(placeholder) for placeholder in found) + ")")


def _whole_word(placeholder: str) -> str:
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, placeholder) else ""
    behind = rf"(?!{_LETTER})" if re.match(_LETTER, placeholder[-1:]) else ""
    return before + re.escape(placeholder) + behind


def mentions(text: str, placeholder: str) -> bool:
    """Return whether a placeholder stands in a text."""
    return placeholder_pattern([placeholder]).search(text) is not None


def texts_of(prompt: str, words: Words | None) -> list[str]:
    """Return a prompt as each entry of `prospect_words` makes it: texts take the place of `*`."""
    return [prompt.replace(PLACEHOLDER, word) if isinstance(word, str) else prompt for word in words or [None]]


# --- values ----------------------------------------------------------------------------------------------------


def read_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> int | float:
    """Return a number as Python's own; raises `ValueError` where it is none, or out of range."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        wanted = f"in {low}..{high}" if is_number else f"a {'whole ' if whole else ''}number"
        raise ValueError(f"{name} must be {wanted}, not {shown(value)}.")
    # NumPy's float32(0.7) was written as 0.7; its double is 0.699999988
    return int(value) if whole else float(str(value) if hasattr(value, "dtype") else value)


def shown(value: object) -> str:
    """Return a value for a message: in short, and of arrays, lists and bytes only what they are."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**20:  # thousands of digits cannot even be written
        return "a number of more than 20 digits"
    if value is not None and not isinstance(value, (str, Real)):
        return f"a {type(value).__name__}"
    text = str(value)
    text = text if len(text) <= 60 else f"{text[:60]}…"
    return repr(text) if isinstance(value, str) else text


def read_scale(text: str, num_stages: int, default: float) -> float | list[float]:
    """Return the guidance scale that a text gives: `7.5`, or with others for some stages `7.5,0-1:1`.

    Args:
        num_stages: S.
        default: for stages that the text does not name.

    Raises:
        ValueError: the text is no such list, or names a stage that there is not.
    """
    scales = [default] * num_stages
    for part in text.split(","):
        stages, colon, scale = part.rpartition(":")
        first, dash, last = stages.partition("-")
        try:
            value = float(scale)
            chosen = range(int(first), int(last if dash else first) + 1) if colon else range(num_stages)
        except ValueError:
            remedy = "give a number, and after commas other ones for stages, such as 7.5,0-1:1"
            raise ValueError(f"scale cannot be read from {shown(text)}; {remedy}.") from None
        if not chosen or chosen[-1] >= num_stages:
            raise ValueError(f"scale has no stages {stages}; they are 0..{num_stages - 1}.")
        if part == text and not colon:
            return value
        scales[chosen.start : chosen.stop] = [value] * len(chosen)
    return scales


def _content(content: Any) -> Any:
    """Return the content image: None, a path with `~` expanded, an open file, or Pillow's image."""
    if isinstance(content, (str, os.PathLike)) and os.fspath(content):
        return os.path.expanduser(content)
    if content is None or hasattr(content, "read") or hasattr(content, "getexif"):
        return content
    raise ValueError(f"content_dir must be a file's path (--content FILE) or an image of Pillow, not {shown(content)}.")


def _concepts(concepts: object) -> dict[str, Any] | None:
    """Return {placeholder: path with `~` expanded, or a loaded concept}; None for none."""
    if not isinstance(concepts, Mapping):
        raise ValueError(f"concepts must be {{name: file}}, not {shown(concepts)}; give them with --concept NAME=FILE.")
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"There are {len(concepts)} concepts; a request takes at most {MAX_CONCEPTS}.")
    read: dict[str, Any] = {}
    for name, source in concepts.items():
        check_placeholder(name)
        if isinstance(source, (str, os.PathLike)) and os.fspath(source):
            source = os.path.expanduser(source)
        elif not hasattr(source, "metadata"):  # it is no loaded one
            found = shown(source)
            raise ValueError(f"The concept '{name}' has no file here, but {found}; give --concept '{name}=FILE'.")
        read[name] = source
    return read or None
