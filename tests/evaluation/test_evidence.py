"""On the small model that ships: the judge can be trusted, captions are followed, and stages mean something."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from evaluation import spectrum
from evaluation.ablation import Ablation
from evaluation.captions import follow_captions
from evaluation.concepts import TRANSFERS, Subject, transferred, windowed
from evaluation.images import Sampling, decode, encode, load, sample, staged
from evaluation.judges import DistanceJudge, load_judge
from evaluation.spectrum import best_windows, caption_experiments, concept_experiments
from evaluation.world.attributes import FACTORS, random_attributes
from evaluation.world.rendered import render

ROOT = Path(__file__).parents[2]
CONFIG, MODEL = "configs/demo/finetune.yaml", "models/demo/model.safetensors"
CLASSIFIER = "models/demo/classifier.safetensors"
FAST = Sampling(10, sampler="dpmpp_2m")  # as good as DDIM in 50 steps (docs/evidence.md)


def test_the_judge_reads_rendered_and_reconstructed_images():
    judge = load_judge(CLASSIFIER)
    attributes = random_attributes(256, 77, held_out=True)
    images = render(attributes, range(256))
    assert ((judge.read(images) == attributes).float().mean(dim=0) >= 0.98).all()
    model, some = load(CONFIG, MODEL), slice(64)
    again = model.decode_first_stage(model.scale_factor * encode(model, images[some]))
    assert ((judge.read(again) == attributes[some]).float().mean(dim=0) >= 0.95).all()


def test_distance_judges_tell_the_poles_apart(tmp_path: Path):
    """Also a real `CLIPModel` of tiny size with random weights; its own features are the oracle."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 16}, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    judge = DistanceJudge(tmp_path)
    a, b, c = render(random_attributes(3, 2), [1, 2, 3], 64).split(1)
    assert judge.names == ("colour", "structure", "clip")
    torch.testing.assert_close(judge.follows(a, a, b), torch.ones(1, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(judge.follows(b, a, b), torch.zeros(1, 3), rtol=0, atol=1e-3)
    colour, structure, _ = judge.follows(a.mean(dim=1, keepdim=True).expand_as(a), a, b)[0]
    assert structure > 0.8 and colour < structure, "grey"
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))
    with torch.no_grad():
        pooled = [model.vision_model(pixel_values=((x + 1) / 2 - mean) / std).pooler_output for x in (a, b, c)]
        x, y, z = (torch.nn.functional.normalize(model.visual_projection(v), dim=-1)[0] for v in pooled)
    near, far = 1 - x @ y, 1 - x @ z
    torch.testing.assert_close(judge.follows(a, b, c)[0, 2], far / (near + far), rtol=1e-3, atol=1e-4)


def test_judges_that_are_not_at_hand_are_named_before_work_starts(tmp_path: Path):
    with pytest.raises(ValueError, match="There is no CLIP model in"):
        DistanceJudge(clip=tmp_path)
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ValueError, match="LPIPS cannot be measured here"):
            DistanceJudge(lpips=True)


def test_captions_are_followed_on_combinations_that_training_never_showed():
    found = follow_captions(CONFIG, MODEL, CLASSIFIER, seed=5, count=32, held_out=True, sampling=FAST)
    correct = found["correct"]
    assert (correct.mean(axis=0) >= 0.8).all(), dict(zip(FACTORS, correct.mean(axis=0), strict=True))


def test_layout_is_decided_early_and_texture_late():
    """The prompt spectrum in small; with stages that did nothing both shares would be equal."""
    experiment = caption_experiments(24, spectrum.sliding(3))["switch"]
    model = load(CONFIG, MODEL)
    images = decode(model, sample(model, experiment.conditions["5"], experiment.seeds, FAST))
    same, other = (
        dict(zip(FACTORS, load_judge(CLASSIFIER).follows(images, *poles).mean(dim=0), strict=True))
        for poles in (experiment.truth, experiment.truth[::-1])
    )
    assert same["position"] > 0.8 and same["background"] > 0.8
    assert same["texture"] < same["position"] - 0.3 and other["texture"] > other["position"] + 0.3


def test_stages_of_their_own_text_are_the_models_own():
    model = load(CONFIG, MODEL)
    texts = [["a red star", "a star"]] * 7 + [["a blue star", "a star"]] * 3
    cond = staged(model, texts)
    with torch.no_grad():
        expected = model.get_learned_conditioning(["a blue star", "a star"]).at(950)
    assert torch.allclose(cond.at(750).k, expected.k) and torch.allclose(cond.at(950).k, expected.k)
    assert not torch.allclose(cond.at(650).k[0], expected.k[0])


def test_windows():
    assert spectrum.sliding(3)[0] == (0, 2) and spectrum.sliding(3)[-1] == (7, 9)
    assert len(spectrum.all_windows()) == 55
    texts = spectrum.switch(["A"], ["B"], [0]).conditions
    assert [stage[0] for stage in texts["7"]] == ["B"] * 7 + ["A"] * 3
    assert {stage[0] for stage in texts["0"]} == {"A"} and {stage[0] for stage in texts["10"]} == {"B"}
    placed = spectrum.place(["a <1> star"], [0], [(2, 4)], {"<1>": "file"})
    assert [stage[0] for stage in placed.conditions["2-4"]] == ["a star"] * 2 + ["a <1> star"] * 3 + ["a star"] * 5
    assert windowed("a * star", [0, 1], 5) == ["a * star", *["a star"] * 4]


def test_windows_are_counted_on_other_seeds_than_they_are_chosen_on():
    experiments = caption_experiments(64, spectrum.sliding(3)) | concept_experiments(
        {f"<{i}>": "file" for i in range(24)}
    )
    chosen = {seed for experiment in experiments.values() for seed in experiment.seeds}
    ablation = Ablation.read(ROOT / "configs/evidence/ablation.yaml")
    counted = [seed for subject in ablation.subjects for seed in subject.seeds(ablation.images)]
    assert len(set(counted)) == len(counted) == 24 * 4 and not chosen & set(counted)


def test_what_was_transferred():
    subjects = [Subject(number, 50) for number in range(10)]
    assert all((subject.attributes != subject.text).all() for subject in subjects)
    prompt, text = TRANSFERS["material"].fill(subjects[0].text), subjects[0].text
    assert "*" in prompt and FACTORS["shape"][text[2]] in prompt
    transfer = TRANSFERS["layout"]  # wants the position, and neither shape nor texture nor colour
    image = np.zeros(6, dtype=int)
    read = np.array([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = transferred(read, image, transfer)
    assert found["wanted"].tolist() == [True, True, False]
    assert found["transferred"].tolist() == [True, False, False]
    leaked = {name: found[f"leaked/{name}"].tolist() for name in transfer.unwanted}
    assert leaked == {"shape": [False, True, False], "texture": [False] * 3, "colour": [False] * 3}


def chosen(windows: dict[str, tuple[int, int]], concepts: int) -> list[int]:
    """For material, of {window: (concepts whose texture comes, concepts whose background does)}; one image each."""
    found = {}
    for window, (textures, backgrounds) in windows.items():
        found[window] = np.zeros((concepts, len(FACTORS)))
        found[window][:textures, list(FACTORS).index("texture")] = 1
        found[window][:backgrounds, list(FACTORS).index("background")] = 1
    return best_windows({f"concept-{name}": found for name in TRANSFERS}, together=1)["material"]


def test_a_window_is_chosen_by_what_it_transfers():
    best = {"2-6": (6, 0), "1-6": (6, 0), "5": (1, 0), "0-9": (8, 8)}
    assert chosen(best, 8) == [2, 3, 4, 5, 6], "of equals the shortest"
    assert chosen(best | {"1-7": (7, 1)}, 8) == [1, 2, 3, 4, 5, 6, 7], "as good but for luck, and transfers more"
    many = {"2-6": (18, 0), "1-7": (19, 3), "0-8": (20, 5)}  # transfers .75, .67 and .62; a standard error is .09
    assert chosen(many, 24) == [1, 2, 3, 4, 5, 6, 7], "less by no more than a standard error"
    assert chosen(best | {"1-7": (7, 2)}, 8) == [2, 3, 4, 5, 6], "a background more often than chance"
    assert chosen(best | {"1-7": (7, 4)}, 8) == [2, 3, 4, 5, 6], "more than a standard error worse"
    assert chosen({"4-5": (0, 0), "5": (0, 0)}, 1) == [5]
    assert chosen({"4-5": (2, 2), "5": (1, 1)}, 2) == [4, 5], "none without the background"
