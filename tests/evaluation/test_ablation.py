from pathlib import Path

import numpy as np
import pytest

from evaluation.ablation import INITIAL_WORDS, Ablation, gain, summary
from evaluation.concepts import MAX_STEPS, TRANSFERS
from evaluation.statistics import difference
from ldm.config import load_config
from scripts import ablate

YAML = Path(__file__).parents[2] / "configs" / "evidence" / "ablation.yaml"


def test_the_yaml_that_ships():
    ablation = Ablation.read(YAML, ["prospect", "word-of-class"], limit=3)
    assert list(ablation.variants) == ["prospect", "word-of-class"] and len(ablation.subjects) == 3
    config = load_config(YAML.parents[2] / ablation.config)
    assert ablation.overrides("prospect", ablation.subjects[0]) == {  # as the configuration learns
        "model.params.frozen_dtype": "bfloat16",
        "model.base_learning_rate": config.model.base_learning_rate,
        MAX_STEPS: config.lightning.trainer.max_steps,
    }
    subject = ablation.subjects[1]
    shapes = ("circle", "square", "triangle", "star", "heart", "cross")
    assert ablation.overrides("word-of-class", subject)[INITIAL_WORDS] == [shapes[subject.attributes[2]]]


def test_one_value_for_each_concept():
    measured = {}
    for number, same in enumerate((1, 0)):
        read = np.full((4, 6), 1 - same)
        reads = {f"read/{name}": read for name in ("reconstruction", *(f"presets/{preset}" for preset in TRANSFERS))}
        measured["prospect", number] = reads | {"image": np.zeros(6, int), "latent_distance": np.ones(4)}
    values = summary(measured, "prospect")
    assert values["reconstruction"].tolist() == [1, 0] and values["wanted/style"].tolist() == [1, 0]
    assert values["transferred/all"].tolist() == [0, 0]  # the first brings the unwanted, too
    # variants are compared on the same concepts
    one, other = ({"transferred/all": np.array(values)} for values in ([0.75, 0.75, 0.0], [0.5, 1.0, 0.0]))
    assert difference(gain(one, other)) == "+0.00 (-0.62 to +0.62)"


TINY = """
config: configs/demo/finetune.yaml
ckpt: models/demo/model.safetensors
classifier: models/demo/classifier.safetensors
seed: 50
concepts: 1
images: 1
steps: 2
scale: 2.5
settings: {lightning.trainer.max_steps: 2}
default: prospect
elsewhere: [prospect, textual-inversion]
variants:
  prospect: {model.base_learning_rate: 1.0e-3}
  textual-inversion: {model.params.prospect_stages: 1, word: shape}
  other: {model.params.time_sampling: stages, model.params.personalization_config.params.norm: word}
"""


def test_the_command_learns_counts_and_resumes(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(YAML.parents[2])
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = ["--workers", "1", "--outdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ablate.py", str(tmp_path / "tiny.yaml"), *flags])
    ablate.main()
    lines = capsys.readouterr().out.splitlines()
    # two tables of three variants, two of them again with the concept in all stages and in the paper's; and a third of
    # what the first has more than the other five
    assert sum(line.startswith(("| prospect", "| text", "| other")) for line in lines) == 7 + 7 + 1 + 5
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(files) == 6 and {"ablation.md", "ablation.json", "transfer.png", "variants.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    learned = [np.load(path)["vectors"] for path in (tmp_path / "learned").rglob("*.npz")]
    assert sorted(vectors.shape for vectors in learned) == [(1, 128), (10, 128), (10, 128)]
    lengths = [np.linalg.norm(vectors, axis=1) for vectors in learned if len(vectors) == 10]
    assert sum(np.allclose(x, x[0], rtol=1e-4) for x in lengths) == 1, "one variant keeps the length of a word"
    ablate.main()
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (TINY, "a: [", "not a readable YAML file"),
        ("config:", "konfig:", "Key 'konfig' not in 'Ablation'"),
        ("seed: 50\n", "", "Missing mandatory value: seed"),
        ("seed: 50", "seed: x", "'x' of type 'str' could not be converted to Integer"),
        ("images: 1", "images: 0", "'concepts' and 'images' must be at least 1"),
        ("word: shape", "word: shap", "starts from the word of 'shap'; choose from"),
        ("default: prospect", "default: prospekt", "no variants prospekt; there are prospect, "),
        ("max_steps: 2", "max_step: 2", "sets 'lightning.trainer.max_step', which has no effect here"),
        ("model.base_learning_rate", "model.base_lerning_rate", "The variant 'prospect': Unknown key"),
        ("prospect_stages: 1", "prospect_stages: 0", "The variant 'textual-inversion': "),
        ("steps: 2\n", "steps: 0\n", "steps must be in 1..1000, not 0"),
        ("scale: 2.5", "scale: .nan", "scale must be in"),
        ("demo/classifier", "demo/nothing", "models/demo/nothing.safetensors"),
        ("demo/model", "demo/nothing", "models/demo/nothing.safetensors"),
    ],
)
def test_other_files_get_one_sentence(old: str, new: str, names: str, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "a.yaml").write_text(TINY.replace(old, new))
    monkeypatch.chdir(YAML.parents[2])
    monkeypatch.setattr("sys.argv", ["ablate.py", str(tmp_path / "a.yaml"), "--outdir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and names in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
