"""Jobs: the same image as `main`, one at a time, stopped within two steps, with the library's own sentences."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import wait_for

from ldm.generate import PNG_KEY, main, read_parameters, save_picture
from ldm.page.engine import Engine, ImageJob
from ldm.request import Request

STAR = "models/demo/concepts/dotted-star.safetensors"
PROMPT = "a large * heart on a black background"


def finished(job: ImageJob) -> ImageJob:
    wait_for(lambda: not job.is_running, 60)
    return job


def test_the_file_is_what_main_gives_byte_for_byte(engine: Engine, tmp_path: Path) -> None:
    settings = {"prompt": PROMPT, "preset": "material", "concepts": {"*": STAR}, "ddim_steps": 4, "seed": 5}
    job = finished(engine.submit(Request(**settings)))
    image = main(model=engine.model, progress=False, **settings)  # type: ignore[arg-type]
    image.info[PNG_KEY] = json.dumps(json.loads(image.info[PNG_KEY]) | engine.setup)
    save_picture(image, tmp_path / "main.png")
    assert (job.state, job.step, len(job.files)) == ("done", 4, 1)
    assert job.files[0].read_bytes() == (tmp_path / "main.png").read_bytes()
    assert sorted(job.previews) == [0, 2, 5, 7]  # the stages of four steps
    assert (
        "info",
        "The preset 'material' is stages 3, 4, 5, 6, 7 of 10, from models/demo/presets.yaml.",
    ) in job.messages


def test_a_batch_is_kept_as_a_grid_and_its_images(engine: Engine) -> None:
    job = finished(engine.submit(Request(prompt="a star", ddim_steps=2, n_samples=2, n_iter=2)))
    assert [Image.open(file).size for file in job.files] == [(256, 256)] + [(128, 128)] * 4
    assert read_parameters(job.files[4])["seed"] == 45
    assert job.step == job.steps == 4


def test_stop_ends_within_two_steps_and_keeps_the_batches_that_are_finished(engine: Engine) -> None:
    for steps, batches, after in ((500, 1, 3), (3, 200, 4)):
        job, waiting = (engine.submit(Request(prompt="a star", ddim_steps=steps, n_iter=batches)) for _ in range(2))
        wait_for(lambda job=job, after=after: job.step >= after, 30)
        stopped_at = job.step
        job.stop()
        waiting.stop()
        assert finished(job).state == "stopped" and job.step <= stopped_at + 2
        assert waiting.state == "stopped" and waiting.step == 0
        assert bool(job.files) == (batches > 1)
    assert read_parameters(job.files[0])["n_iter"] >= 1
    assert finished(engine.submit(Request(prompt="a star", ddim_steps=1))).state == "done"


def test_jobs_do_not_run_at_once_and_hear_only_their_own_warnings(engine: Engine) -> None:
    first = engine.submit(Request(prompt="a star", ddim_steps=10))
    second = engine.submit(Request(prompt="a * star", ddim_steps=1))
    assert second.state == "waiting"
    finished(second)
    assert not first.is_running and not first.messages
    unlearned = "Nothing is learned or loaded for '*', so it is read as an ordinary character."
    assert second.messages == [("warning", unlearned)]


def test_what_cannot_be_done_is_the_librarys_sentence(engine: Engine) -> None:
    with pytest.raises(ValueError, match="height must be a multiple of 32 for this model, not 100; nearest: 96"):
        engine.submit(Request(prompt="a star", height=100))
    job = finished(engine.submit(Request(prompt="a * star", concepts={"*": "nowhere.safetensors"})))
    assert job.state == "failed" and job.error.startswith("There is no file 'nowhere.safetensors'; check the path")


def test_previews_take_little_of_the_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(latents: object) -> Image.Image:
        calls.append(latents)
        time.sleep(0.2)
        return Image.fromarray(np.zeros((8, 8, 3), np.uint8))

    monkeypatch.setattr(engine, "preview", slow)
    job = finished(engine.submit(Request(prompt="a star", ddim_steps=50)))
    assert job.state == "done" and 10 <= len(calls) <= 14  # one of each stage, and few more


def test_concepts_are_those_beside_the_model_and_those_that_were_learned(engine: Engine, tmp_path: Path) -> None:
    learned = tmp_path / "logs" / "page" / "cup-2026" / "checkpoints" / "embeddings.safetensors"
    learned.parent.mkdir(parents=True)
    learned.write_bytes(b"")
    names = engine.concepts(["up/loaded.bin"])
    assert list(names.values()) == [
        "loaded", "checkered-circle", "dotted-star", "ringed-triangle", "striped-heart", "cup-2026"
    ]  # fmt: skip
    reference = engine.reference_of(STAR)
    assert reference is not None and reference.is_file() and engine.reference_of("cup-2026") is None


def test_tokens_are_counted_as_the_library_cuts_them(engine: Engine) -> None:
    assert engine.tokens("") == 0
    assert engine.tokens("a large * heart") == 4
    assert engine.tokens("a large <star> heart") > engine.tokens("a large <star> heart", ["<star>"]) == 4
    assert engine.most_tokens == 30
