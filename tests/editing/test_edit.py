"""Editing: what must hold without the reference, words and stages, and everything that is refused."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from editing_cases import PROMPT, STAR
from PIL import Image
from torch import Tensor

from ldm.editing import alignment
from ldm.editing.alignment import PromptTokens
from ldm.editing.control import layers_of
from ldm.editing.edit import edit_generated, plan_edit, read_tokens
from ldm.editing.invert import OPTIONS, SCALE, changes, check_belongs, edit_image, invert_image, word_masks
from ldm.editing.invert import PROMPT as PROMPT_KEY
from ldm.editing.masks import mask_of
from ldm.editing.request import Edit, InversionOptions, grid_of
from ldm.embeddings import Concept
from ldm.generate import main
from ldm.methods.base import TIMESTEPS
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import Site

ALL, NONE = ({f"tau_{x}": value for x in "vcsu"} for value in (1, 0))


def tokens(text: str, pieces: dict[str, int] | None = None) -> PromptTokens:
    """A prompt whose words are one token each, or as many as `pieces` says."""
    words = [(w, [hash((w, k)) % 1000 for k in range((pieces or {}).get(w, 1))]) for w in text.split(" ")]
    return PromptTokens.of(words, (49406, 49407))


# Alignment and rules


def test_identical_prompts_are_aligned_with_themselves() -> None:
    prompt = tokens("a dog, on the grass", {"grass": 3})
    assert torch.equal(alignment.replacement_mapper(prompt, prompt), torch.eye(77))
    index, aligned = alignment.refinement_mapper(prompt, prompt)
    assert torch.equal(index, torch.arange(77)) and aligned.all()
    _, aligned = alignment.refinement_mapper(tokens("a dog"), tokens("a sitting dog", {"sitting": 2}))
    assert aligned[:7].tolist() == [1, 1, 0, 0, 1, 1, 1]


def test_words_of_more_and_of_fewer_tokens() -> None:
    """What follows an exchanged word is carried over to where that stands now; the reference misses it."""
    source = tokens("a cat on it")
    longer = tokens("a tiger on it", {"tiger": 2})
    right = alignment.replacement_mapper(source, longer)
    assert right[2, 2:4].tolist() == [0.5, 0.5] and right[3, 4] == right[4, 5] == 1
    wrong = alignment.replacement_mapper(source, longer, compat=True)
    assert wrong[3].sum() == 0 and wrong[4, 4] == 1
    back = alignment.replacement_mapper(longer, source)
    assert back[2:4, 2].tolist() == [1, 1] and back[4, 3] == 1 and (back.sum(dim=0) > 0).all()


def test_prompts_that_are_cut_off() -> None:
    long = tokens(" ".join(f"w{i}" for i in range(100)))
    assert len(long.ids) == 77 and long.places_of("w74") == [75] and long.places_of("w75") == []
    assert alignment.replacement_mapper(long, long).equal(torch.eye(77))
    assert long.mask(["w3", "w90"]).nonzero().tolist() == [[4]]


def test_layers_with_words_maps(demo: LatentDiffusion) -> None:
    unet = demo.model.diffusion_model
    assert unet.attention_places == [("down", 2), ("down", 4), ("mid", 4), ("up", 4), ("up", 4), ("up", 2), ("up", 2)]
    assert layers_of(demo, torch.zeros(1, 4, 16, 16)) == (0, 5, 6)
    assert layers_of(demo, torch.zeros(1, 4, 64, 96)) == (1, 3, 4)


# Whole edits


@pytest.mark.parametrize("method", ["stylediffusion", "null-text", "text"])
def test_an_edit_that_changes_nothing(demo: LatentDiffusion, concepts: dict[str, Concept], method: str) -> None:
    own = concepts[method]
    concept = Concept(own.tensors, own.metadata | {"base_model_fingerprint": "0" * 16}, method=own.method)
    found = edit_image(demo, concept, Edit(PROMPT, **ALL), progress=False, any_base=True)
    if method != "text":  # whose source reads learned contexts that the edit does not
        assert torch.equal(found.latents[0], found.latents[1])
    assert found.image.size == (128, 128)


def test_without_control_rows_are_independent(demo: LatentDiffusion) -> None:
    """All taus 0: the edit is the image that its prompt gives alone."""
    edit = Edit("a striped blue heart", **NONE)
    found = edit_generated(demo, PROMPT, edit, seed=3, steps=5, guidance_scale=2.5, progress=False)
    alone = edit_generated(demo, edit.target, dataclasses.replace(edit, tau_c=1), 3, 5, 2.5, progress=False)
    torch.testing.assert_close(found.latents[1], alone.latents[0], rtol=0, atol=1e-4)
    other = main(edit.target, ddim_steps=5, scale=2.5, seed=3, model=demo, progress=False)
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(other)).max() <= 1


def test_the_source_does_not_depend_on_its_edit(demo: LatentDiffusion, concepts: dict[str, Concept]) -> None:
    edits = [Edit(t, blend=("star", t.split()[-1])) for t in ("a dotted red heart", "a dotted blue star")]
    first, second = (edit_image(demo, concepts["stylediffusion"], edit, progress=False) for edit in edits)
    torch.testing.assert_close(first.latents[0], second.latents[0], rtol=0, atol=1e-5)
    assert not torch.equal(first.latents[1], second.latents[1])


def test_latents_that_are_not_square(demo: LatentDiffusion) -> None:
    image = Image.open(STAR).resize((192, 128))
    options = InversionOptions(2, 2.5, 1)
    concept = invert_image(demo, image, PROMPT, options=options, size=(128, 192), progress=False)
    edit = Edit("a dotted red heart", blend=("star", "heart"), subtract=("dotted", "dotted"))
    assert edit_image(demo, concept, edit, progress=False).image.size == (192, 128)


def test_stages_of_prospect(demo: LatentDiffusion, concepts: dict[str, Concept]) -> None:
    """A stage-wise target: one text in all stages is a plain one; a learned token may stand in it."""
    texts, plain = ["blue"] * 10, Edit("a dotted blue star", weights={"blue": 2.0})
    staged = Edit("a dotted * star", weights={"blue": 2.0}, prospect_words=texts)
    first, second = (edit_image(demo, concepts["null-text"], e, progress=False) for e in (plain, staged))
    torch.testing.assert_close(first.latents, second.latents, rtol=0, atol=1e-5)
    manager = demo.embedding_manager
    assert manager is not None
    with manager.keeping():
        manager.load("models/demo/concepts/striped-heart.safetensors")
        words = ["*"] * 5 + [3, None, "blue", "red", "*"]
        edit = Edit("a dotted * star", blend=(("star",), ("star",)), prospect_words=words)
        third = edit_image(demo, concepts["null-text"], edit, progress=False)
    assert not torch.equal(third.latents[1], first.latents[1])


def test_grid_of_taus() -> None:
    edits = grid_of("a", tau_v=[0.2, 0.5], tau_c=0.4, tau_s=(0.3,), tau_u=[0, (0.1, 1)])
    assert [(e.tau_v, e.tau_c, e.tau_s, e.tau_u) for e in edits] == [
        (v, 0.4, 0.3, u) for v in (0.2, 0.5) for u in (0.0, (0.1, 1.0))
    ]


def test_masks(demo: LatentDiffusion, concepts: dict[str, Concept]) -> None:
    """The foreground of the object is brighter inside than in the corners."""
    foreground, rest = word_masks(demo, concepts["stylediffusion"], ["star"], steps=5)["star"]
    grey = np.asarray(foreground).astype(float)
    assert grey.shape == (256, 256) and grey[60:140, 90:170].mean() > grey[-60:, :60].mean() + 20
    assert np.array_equal(255 - np.asarray(foreground), np.asarray(rest))


# What is refused


def edit_with(**changes: Any) -> Callable[[LatentDiffusion, Concept], object]:
    given = {"target": "a dotted blue star"} | changes
    return lambda model, concept: edit_image(model, concept, Edit(**given), progress=False)


def damaged(tensors: dict[str, Tensor] | None = None, **metadata: str) -> Callable[[LatentDiffusion, Concept], object]:
    def act(model: LatentDiffusion, concept: Concept) -> None:
        given = Concept(concept.tensors | (tensors or {}), concept.metadata | metadata, concept.method)
        check_belongs(given, model)

    return act


def at_a_placeholder(model: LatentDiffusion, concept: Concept) -> object:
    assert model.embedding_manager is not None
    return model.embedding_manager.load({"*": concept})


def inverted_in_half(model: LatentDiffusion, concept: Concept) -> object:
    try:
        model.model.half()
        return invert_image(model, STAR, PROMPT, progress=False)
    finally:
        model.model.float()  # the same values: the file's are in half precision


def empty_mask(model: LatentDiffusion, concept: Concept) -> object:
    return mask_of(torch.zeros(8, 8, 32), read_tokens(model.prompt_reader(), PROMPT), "star")


def invert_with(*given: Any, **options: Any) -> Callable[[LatentDiffusion, Concept], object]:
    return lambda model, concept: invert_image(model, STAR, PROMPT, *given, progress=False, **options)


REFUSED: dict[str, tuple[Callable[[LatentDiffusion, Concept], object], str]] = {
    "blend": (edit_with(blend=("dog", "star")), "of the source: 'dog' is no word .* its words are 'a', 'dotted'"),
    "target's blend": (edit_with(blend=("star", ("heart", "moon"))), "of the target: 'heart', 'moon' is no word"),
    "weight": (edit_with(weights={"red": 2}), "weight: 'red' is no word of the prompt 'a dotted blue star'"),
    "word count": (edit_with(target="a star"), "as many words in 'a dotted red star' as in 'a star'; use kind refine"),
    "kind": (edit_with(kind="swap"), "kind must be one of replace, refine"),
    "tau above 1": (edit_with(tau_c=1.5), "tau_c must be in 0..1"),
    "tau backwards": (edit_with(tau_s=(0.8, 0.2)), "the start before the end"),
    "tau of three": (edit_with(tau_s=(0.1, 0.2, 0.3)), "tau_s must be in 0..1, or two such numbers"),
    "tau is a word": (edit_with(tau_u="half"), "tau_u must be in 0..1, .*, not 'half'"),
    "tau is NaN": (edit_with(tau_u=float("nan")), "tau_u must be in 0..1"),
    "weight is a word": (edit_with(weights={"blue": "much"}), "The weight of 'blue' must be a number, not 'much'"),
    "half a blend": (edit_with(blend=("star",)), "words of the source and words of the target"),
    "another base": (
        damaged(base_model="other.ckpt", base_model_fingerprint="0" * 16),
        "learned for the base model 'other.ckpt'",
    ),
    "another width": (
        damaged({"gamma_beta": torch.zeros(4, 154, 768)}),
        r"has 77 tokens of width 768, .* which this model \(32 of 128, 4 channels, 1000 timesteps\) cannot read",
    ),
    "a placeholder": (at_a_placeholder, r"\(stylediffusion\) inverts one image and stands at no placeholder"),
    "half precision": (inverted_in_half, "does not converge in half precision; load the model with dtype float32"),
    "an empty mask": (empty_mask, "mask of 'star' is empty"),
    "an unknown method": (invert_with("ddim"), "method must be one of stylediffusion, null-text, text, not 'ddim'"),
    "null-text, scale 1": (invert_with("null-text", InversionOptions(guidance_scale=1)), "other than 1"),
    "features": (invert_with(clip=torch.zeros(1, 197, 768)), r"must be \(1, T, 128\)"),
    "no CLIP": (invert_with(clip="models/demo"), "There is no CLIP model in 'models/demo'"),
    "a size": (invert_with(size=(100, 128)), "height must be a multiple of 32 for this model, not 100"),
    "too many steps": (lambda *_: InversionOptions(steps=101), r"steps must be in 1..100"),
    "steps as text": (lambda *_: InversionOptions(steps="30"), "steps must be a whole number, not '30'"),
    "a switch as text": (lambda *_: InversionOptions(half_maps="no"), "half_maps must be true or false"),
    "weights as a list": (edit_with(weights=[1]), "weights must be .word: number., not a list"),
    "a generated image's scale": (
        lambda m, _: edit_generated(m, "a", Edit("b"), guidance_scale=math.nan),
        "scale must be in 0..1000, not nan",
    ),
    "no prompt": (damaged(**{PROMPT_KEY: ""}), "does not say its prompt; invert the image anew"),
    "no scale": (damaged(**{SCALE: "nan"}), "does not say its guidance_scale"),
    "timesteps that go up": (damaged(**{TIMESTEPS: "1,2,3,4"}), "do not go down"),
    "a negative timestep": (damaged(**{TIMESTEPS: "3,2,1,-1"}), "do not go down"),
    "too few timesteps": (damaged(**{TIMESTEPS: "3,2,1"}), "do not go down to the image in 4 steps"),
    "a timestep too late": (damaged(**{TIMESTEPS: "1000,2,1,0"}), "timesteps up to 1000, which this model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    demo: LatentDiffusion, concepts: dict[str, Concept], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, before the U-Net is called."""
    act, message = REFUSED[name]
    monkeypatch.setattr(type(demo), "apply_model", None)
    with pytest.raises(ValueError, match=message) as error:
        act(demo, concepts["stylediffusion"])
    assert "\n" not in str(error.value)


def test_what_an_inversion_is_of(concepts: dict[str, Concept]) -> None:
    said = concepts["stylediffusion"].metadata
    assert changes(said, STAR, PROMPT, {"steps": 4, "epsilon": None}) == ""
    found = changes(said, Image.new("RGB", (9, 9)), "a star", {"steps": 30, "method": "text"})
    assert re.match(r"steps \(4, not 30\), prompt \('a dotted red star', not 'a star'\), image \('\w{10}', not", found)
    assert found.endswith("method ('stylediffusion', not 'text-inversion')")
    assert changes({OPTIONS: "[["}, None, PROMPT, {}) == f"prompt (None, not '{PROMPT}')"


def test_hooks_only_where_they_are_needed(demo: LatentDiffusion) -> None:
    """Without a blend, and after all taus, no probabilities are made any more."""
    z, called = torch.randn(1, 4, 16, 16), []
    plan = plan_edit(demo, PROMPT, Edit(PROMPT, tau_c=0.5), [751, 501, 251, 1], z)
    for t, is_cross, queries in [(751, True, 64), (251, True, 64), (501, False, 64), (1, False, 64), (751, False, 65)]:
        called.append(plan.control.wants(Site(0, is_cross, t), queries))
    assert called == [True, False, True, False, False]
