"""The flags of `scripts/txt2img.py` and `scripts/img2img.py`; imports nothing heavy, so `--help` answers at once."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ldm.cli.flags import Once, Parser, add_flag

# What makes the model, recorded in a picture beside the arguments of `main`.
MODEL_DEFAULTS = {"config": "configs/demo/finetune.yaml", "ckpt": "models/demo/model.safetensors", "dtype": "float32"}
ONE_PROMPT = "for other pictures run the command again, for a text of its own in each stage give --word for each."
HELP_PRESET = (
    "what the concept gives, the prompt the rest: content, layout, material or style; of several concepts only the "
    "first that the prompt names (ldm.prompts.joint, in Python, takes something from each)"
)


def device(text: str) -> str:
    """A device's name: cpu, mps, cuda or cuda:N."""
    if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, mps, cuda and cuda:0, cuda:1, …")
    return text


def word(text: str) -> str | int:
    """An entry of `prospect_words`: a number is the learned token of that stage, anything else a text."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def build_parser(description: str, editing: bool) -> Parser:
    """The flags; those that go to `main` have its argument's name as `dest`, and None where they are not given."""
    summary, _, examples = description.partition("\n")
    parser = Parser(
        description=summary,
        epilog="examples:\n" + examples.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    what = parser.add_argument_group("what to show")
    if editing:
        add_flag(what, "--content", dest="content_dir", metavar="FILE", help="the picture to edit")
        add_flag(
            what, "--strength", type=float, metavar="X", help="how much of it is given up, 0 (nothing) to 1 (all) (0.5)"
        )
        add_flag(
            what, "--resize", metavar="HOW", help="how it is brought to width x height: crop, pad or squash (crop)"
        )
    help_prompt = "in it, * stands for the concept or for the entries of --words"
    add_flag(what, "--prompt", action=Once, instead=ONE_PROMPT, metavar="TEXT", help=help_prompt)
    help_negative = "plain text that guidance leads away from (nothing)"
    add_flag(what, "--negative_prompt", metavar="TEXT", help=help_negative)
    words = what.add_mutually_exclusive_group()
    help_words = "YAML: a list of one entry for each stage, the END of generation first; or {argument: value, …}"
    add_flag(words, "--words", metavar="FILE", help=help_words)
    help_word = "one entry of that list, given once for each stage; a number is the learned token of that stage"
    add_flag(words, "--word", dest="prospect_words", action="append", type=word, metavar="TEXT", help=help_word)
    add_flag(words, "--preset", metavar="ATTRIBUTE", help=HELP_PRESET)
    help_concept = "learned embedding; several: '<vase>=FILE', each with its own name in the prompt"
    add_flag(what, "--concept", action="append", metavar="[NAME=]FILE", help=help_concept)
    help_base = "use concepts that were learned for another base model"
    add_flag(what, "--any_base", action="store_const", const=True, help=help_base)
    add_flag(what, "--from", dest="source", metavar="PNG", help="repeat this picture; other flags change it")

    how = parser.add_argument_group("how")
    add_flag(how, "--steps", dest="ddim_steps", type=int, metavar="N", help="denoising steps (50)")
    add_flag(
        how,
        "--scale",
        type=float,
        metavar="X",
        help="guidance scale, 1 for none (the model's own: 10 for Stable Diffusion)",
    )
    add_flag(how, "--seed", type=int, metavar="N", help="of the first picture; the next ones count on (42)")
    add_flag(how, "--eta", dest="ddim_eta", type=float, metavar="X", help="0 is deterministic, 1 as random as DDPM (0)")
    add_flag(how, "--sampler", metavar="NAME", help="ddim or plms (ddim)")
    add_flag(how, "--n_samples", type=int, metavar="N", help="pictures in a batch (1)")
    add_flag(how, "--n_iter", type=int, metavar="N", help="batches (1)")
    add_flag(
        how, "--n_rows", type=int, metavar="N", help="pictures in a row of the grid, 0 for as square as possible (0)"
    )
    add_flag(how, "--height", type=int, metavar="PIXELS", help="(the model's own: 512 for Stable Diffusion)")
    add_flag(how, "--width", type=int, metavar="PIXELS", help="(the same)")
    help_legacy = "read --words as the reference does: only the first piece of each word"
    add_flag(how, "--legacy_word_tokens", action="store_const", const=True, help=help_legacy)

    model = parser.add_argument_group("model and files")
    add_flag(model, "--config", metavar="YAML", help=f"({MODEL_DEFAULTS['config']})")
    help_ckpt = f".ckpt, .safetensors or diffusers folder ({MODEL_DEFAULTS['ckpt']})"
    add_flag(model, "--ckpt", metavar="FILE", help=help_ckpt)
    add_flag(model, "--dtype", metavar="TYPE", help="of the weights: float32, float16 or bfloat16 (float32)")
    add_flag(model, "--device", type=device, metavar="NAME", help="cpu, cuda, cuda:1 or mps (the fastest there is)")
    help_allow = "packages of your own whose classes the configuration may name"
    add_flag(model, "--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=help_allow)
    add_flag(model, "--outdir", type=Path, default=Path("outputs"), metavar="DIR", help="for the pictures (outputs)")
    add_flag(model, "--debug", action="store_true", help="show the whole trace of an error")
    return parser
