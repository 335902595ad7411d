"""The form: what it asks for, and that an image's record restores it."""

import json
from collections.abc import Callable, Sequence

import pytest

from ldm.conditioning.presets import Windows, preset
from ldm.page.form import Form
from ldm.request import ModelFacts, Request

FACTS = ModelFacts()
PROMPT = "a large * heart on a black background"
WITHOUT = "a large heart on a black background"


def form(*names: str, prompt: str = PROMPT) -> Form:
    made = Form(prompt=prompt, settings={"seed": 7})
    for name in names:
        made.add_concept(f"{name}.safetensors")
    return made


def recorded(request: Request, **more: object) -> dict[str, object]:
    """A request as `ldm.generate` records it."""
    values = {name: getattr(request, name) for name in Request.__dataclass_fields__ if name != "preset"}
    words = values["prospect_words"]
    values["prospect_words"] = None if words is None else list(words)  # type: ignore[call-overload]
    found: dict[str, object] = json.loads(json.dumps(values)) | more
    return found


def toggled() -> Form:
    made = form("star")
    made.set_preset(made.lanes[0], "layout", Windows())
    made.set_stage(made.lanes[0], 8, True)
    return made


def with_text() -> Form:
    made = form("star")
    made.own = {3: "a cat"}
    made.lanes[0].stages.discard(3)
    return made


@pytest.mark.parametrize(
    ("make", "prompt", "words", "groups"),
    [
        (lambda: form("star"), PROMPT, None, [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]),
        (toggled, "*", (WITHOUT,) * 8 + (PROMPT,) * 2, [[9, 8], [7, 6, 5, 4, 3, 2, 1, 0]]),
        (with_text, "*", (PROMPT,) * 3 + ("a cat",) + (PROMPT,) * 6, [[9, 8, 7, 6, 5, 4], [3], [2, 1, 0]]),
    ],
)
def test_a_form_asks_for_its_prompt_or_for_the_text_of_each_stage(
    make: Callable[[], Form], prompt: str, words: Sequence[str] | None, groups: list[list[int]]
) -> None:
    made = make()
    request = made.request()
    assert (request.prompt, request.prospect_words, request.preset, request.seed) == (prompt, words, None, 7)
    assert request.concepts == {"*": "star.safetensors"} and made.groups() == groups


@pytest.mark.parametrize("attribute", ["content", "layout", "material", "style"])
def test_a_preset_is_asked_for_by_its_name_and_shows_its_window(attribute: str) -> None:
    made, windows = form("star"), Windows({"material": [3, 4]})
    made.set_preset(made.lanes[0], attribute, windows)
    assert made.request().preset == attribute and made.lanes[0].stages == set(windows[attribute])
    assert [made.text(stage) for stage in range(10)] == preset(attribute, PROMPT, windows=windows)


def test_two_concepts_of_one_name_are_refused() -> None:
    made = form("star", "heart")
    assert [lane.placeholder for lane in made.lanes] == ["*", "<heart>"]
    made.lanes[1].placeholder = "*"
    with pytest.raises(ValueError, match="Two concepts have the same name"):
        made.request()


def test_another_stages_token_stands_at_the_prompts_placeholder() -> None:
    made = form("star", prompt="a photo of *")
    made.own = {0: 9}
    made.set_stage(made.lanes[0], 5, False)
    assert made.request().prospect_words == (9, None, None, None, None, "", None, None, None, None)
    made.own[1] = "a photo of a cat"
    assert made.request().prospect_words[1] == "a cat"  # type: ignore[index]
    made.own[1] = "a cat"
    with pytest.raises(ValueError, match="Stage 1 reads another text"):
        made.request()


def two_lanes() -> Form:
    made = form("a", "b", prompt="a <b> * thing")
    made.lanes[0].stages, made.lanes[1].stages = {0, 1, 2}, {2, 3, 9}
    return made


def tokens() -> Form:
    made = form("star", prompt="a photo of *")
    made.own = {stage: stage // 2 for stage in range(10)}
    return made


def settings() -> Form:
    made = form(prompt='a (cat) "quoted" <img src=x onerror=alert(1)>')
    made.settings |= {"scale": 4.0, "sampler": "plms", "width": 256, "negative_prompt": "grey", "strength": 0.3}
    return made


@pytest.mark.parametrize("make", [form, two_lanes, toggled, with_text, tokens, settings])
def test_a_record_restores_the_form(make: object) -> None:
    made = make()  # type: ignore[operator]
    assert Form.restored(recorded(made.request()), FACTS) == made


def test_the_record_of_a_preset_restores_the_preset() -> None:
    made = form("star")
    made.set_preset(made.lanes[0], "material", Windows())
    asked = Request(prompt="*", prospect_words=preset("material", PROMPT), concepts=made.request().concepts, seed=7)
    assert Form.restored(recorded(asked, preset="material", preset_prompt=PROMPT), FACTS) == made


def test_a_strangers_record_is_checked_and_costs_no_time() -> None:
    concepts = {f"<{number}>": "a.safetensors" for number in range(100)}
    record = {"prompt": "*", "prospect_words": [" ".join(concepts)] * 10, "concepts": concepts}
    assert len(Form.restored(record, FACTS).lanes) == 100
    wrong: list[tuple[dict[str, object], str]] = [
        ({"prompt": "a", "seed": -1}, "seed must be in"),
        ({"prompt": "*", "prospect_words": ["a", "b"] * 5000}, "prospect_words has 10000 entries, but this model has"),
        ({"prompt": "a", "scale": [1, 2]}, "scale has 2 entries, but this model has 10 stages"),
    ]
    for record, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            Form.restored(record, FACTS)
