"""Sets of captions that published methods learn in; `{}` stands for the placeholder.

`object` and `style` are NeTI's (Alaluf et al. 2023), and of diffusers' textual inversion; `textual-inversion` is that
of Gal et al. 2022, where some captions stand three times.
"""

from __future__ import annotations

_OF = "a|the|my|one|a clean|the clean|a nice|the nice|a cool|the cool|a small|the small|a dirty|the weird|the large"
_WHOLE = ["the photo of a {}", "a dark photo of the {}", "a bright photo of the {}", "a rendering of a {}"]
_WHOLE += [f"a {kind} photo of {a} {{}}" for kind in ("cropped", "good", "close-up") for a in ("a", "the")]
_WHOLE += ["a rendition of a {}", "a rendition of the {}"]
_PAINTINGS = "a|the|a clean|a dirty|a dark|a cool|a bright|a good|a nice|a small|a weird|a large"
_PAINTINGS += 2 * "|a cropped|a close-up"


def _captions(kind: str) -> list[str]:
    return [*(f"{kind} of {what} {{}}" for what in _OF.split("|")), *_WHOLE]


TEMPLATES = {
    "object": _captions("a photo"),
    "style": [f"{kind} in the style of {{}}" for kind in ("a rendering", "a picture", "a rendition")]
    + [f"{what} painting in the style of {{}}" for what in _PAINTINGS.split("|")],
    "textual-inversion": [*_captions("a photo"), *_captions("an illustration"), *_captions("a depiction")],
}
