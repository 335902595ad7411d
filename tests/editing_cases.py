"""The image, prompt and options that tests of editing share."""

from pathlib import Path

from ldm.editing.request import InversionOptions

ROOT = Path(__file__).parents[1]
STAR = ROOT / "models/demo/references/dotted-star/dotted-star.png"
PROMPT = "a dotted red star"
OPTIONS = InversionOptions(steps=4, guidance_scale=2.5, inner_steps=2)
