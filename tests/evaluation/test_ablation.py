from pathlib import Path

import numpy as np
import pytest

from evaluation.ablation import INITIAL_WORDS, Ablation
from evaluation.comparison import difference, gain, summary
from evaluation.concepts import MAX_STEPS, TRANSFERS, concept_attributes
from ldm.config import load_config
from scripts import ablate

YAML = Path(__file__).parents[2] / "configs" / "evidence" / "ablation.yaml"


def test_the_yaml_that_ships():
    ablation = Ablation.read(YAML, ["prospect", "word-of-class"], limit=3)
    assert list(ablation.jobs()) == [f"{name}-{i:02d}" for name in ("prospect", "word-of-class") for i in range(3)]
    config = load_config(ablation.config)
    assert ablation.overrides("prospect", 0) == {  # as the configuration learns
        "model.params.frozen_dtype": "bfloat16",
        "learning_rate": pytest.approx(config.model.base_learning_rate * config.data.params.batch_size),
        MAX_STEPS: config.lightning.trainer.max_steps,
    }
    picture, _ = concept_attributes(1, ablation.seed)
    shapes = ("circle", "square", "triangle", "star", "heart", "cross")
    assert ablation.overrides("word-of-class", 1)[INITIAL_WORDS] == [shapes[picture[2]]]


def test_one_value_for_each_concept():
    ablation = Ablation.read(YAML, ["prospect"], limit=2)
    measured = {}
    for job, same in zip(ablation.jobs(), (1, 0), strict=True):
        read = np.full((4, 6), 1 - same)
        reads = {f"read/{name}": read for name in ("reconstruction", *(f"presets/{preset}" for preset in TRANSFERS))}
        measured[job] = reads | {"picture": np.zeros(6, int), "latent_distance": np.ones(4)}
    values = summary(ablation, measured, "prospect")
    assert values["reconstruction"].tolist() == [1, 0] and values["wanted/style"].tolist() == [1, 0]
    assert values["transferred/all"].tolist() == [0, 0]  # the first brings the unwanted, too


def test_variants_are_compared_on_the_same_concepts():
    default = {"transferred/all": np.array([0.5, 1.0, 0.0, 0.0])}
    differences = gain({"transferred/all": np.array([0.75, 0.75])}, default)
    assert differences.tolist() == [0.25, -0.25]
    assert difference(np.array([0.25, -0.25, 0.0])) == "+0.00 (-0.60 to +0.60)"


TINY = """
config: configs/demo/finetune.yaml
ckpt: models/demo/model.safetensors
classifier: models/demo/classifier.safetensors
seed: 50
pictures: 1
steps: 2
scale: 2.5
settings: {lightning.trainer.max_steps: 2}
default: prospect
elsewhere: [prospect, textual-inversion]
variants:
  prospect: {concepts: 1, learning_rate: 1.0e-3}
  textual-inversion: {concepts: 1, model.params.prospect_stages: 1, word: shape}
  other: {concepts: 1, model.params.time_sampling: stages, model.params.personalization_config.params.norm: word}
"""


def test_the_command_learns_counts_and_goes_on(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(YAML.parents[2])
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(
        "sys.argv", ["ablate.py", str(tmp_path / "tiny.yaml"), "--workers", "1", "--outdir", str(tmp_path)]
    )
    ablate.main()
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("| prospect", "| text", "| other"))
    ]
    # two tables of three variants, two of them again with the concept in all stages and in the paper's; and a third of
    # what the first has more than the other five
    assert len(rows) == 7 + 7 + 1 + 5
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(files) == 6 and {"ablation.md", "ablation.json", "transfer.png", "variants.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    vectors = np.load(tmp_path / "learned" / "other-00.npz")["vectors"]
    lengths = np.linalg.norm(vectors, axis=1)
    assert vectors.shape == (10, 128) and np.allclose(lengths, lengths[0], rtol=1e-4)
    ablate.main()
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, "There is no file of variants"),
        ("a: [", "not a readable YAML file"),
        ("config: x", "must have the keys"),
        (TINY.replace("variants:", "variants: [a]\nx:"), "must have the keys"),
        (TINY.partition("variants:")[0] + "variants: [a]", "must be sections"),
        (TINY.partition("variants:")[0] + "variants: {}", "must be sections"),
        (TINY.replace("{concepts: 1, learning_rate: 1.0e-3}", "null"), "must be a section that says how many"),
        (TINY.replace("concepts: 1, learning", "concepts: many, learning"), "must be a section that says how many"),
        (TINY.replace("concepts: 1, learning", "concepts: 0, learning"), "must be a section that says how many"),
        (TINY.replace("word: shape", "word: shap"), "starts from the word of 'shap'; choose from position"),
        (TINY.replace("default: prospect", "default: prospekt"), "has no variants prospekt"),
        (TINY.replace("elsewhere: [prospect", "elsewhere: [prospekt"), "has no variants prospekt"),
        (TINY.replace("learning_rate: 1.0e-3", "lightning.trainer.max_step: 7"), "sets 'lightning.trainer.max_step'"),
        (TINY.replace("learning_rate", "lerning_rate"), "sets 'lerning_rate', which does not count here; what does"),
        (TINY.replace("learning_rate", "model.base_learning_rate"), "sets 'model.base_learning_rate'"),
        (TINY.replace("time_sampling: stages", "ckpt_path: x"), "sets 'model.params.ckpt_path'"),
        (TINY.replace("max_steps: 2", "max_steps: -1"), "has lightning.trainer.max_steps -1; it must be"),
        (TINY.replace("learning_rate", "5"), "sets '5', which does not count here"),
        (TINY.replace("1.0e-3", "0"), "has the learning_rate 0; it must be"),
        (TINY.replace("1.0e-3", "1e-3"), "has the learning_rate '1e-3'; it must be"),
        (TINY.replace("prospect_stages: 1", "prospect_stage: 1"), "The variant 'textual-inversion': "),
        (TINY.replace("prospect_stages: 1", "prospect_stages: 0"), "The variant 'textual-inversion': "),
        (TINY.replace("model.params.time", "data.params.train.params.time"), "has no parameter 'time_sampling'"),
        (TINY.replace("pictures: 1", "pictures: 0"), "'pictures' in"),
        (TINY.replace("seed: 50", "seed: x"), "'seed' in"),
        (TINY.replace("steps: 2\n", "steps: 0\n"), "ddim_steps"),
        (TINY.replace("scale: 2.5", "scale: .nan"), "'scale' in"),
        (TINY.replace("word: shape", "word: [shape]"), "starts from the word of '['shape']'"),
        (TINY.replace("default: prospect", "default: [prospect]"), "has no variants ['prospect']"),
        (TINY.replace("demo/classifier", "demo/nothing"), "models/demo/nothing.safetensors"),
        (TINY.replace("demo/model", "demo/nothing"), "models/demo/nothing.safetensors"),
        (TINY.replace("demo/finetune", "demo/nothing"), "configs/demo/nothing.yaml"),
    ],
)
def test_other_files_get_one_sentence(text: str | None, names: str, tmp_path: Path, capsys, monkeypatch):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["ablate.py", str(path), "--outdir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and names in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
