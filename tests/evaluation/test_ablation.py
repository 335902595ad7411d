from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.ablation import INITIAL_WORDS, Ablation, summary
from ldm.evaluation.concepts import TRANSFERS, concept_attributes
from scripts import ablate

YAML = Path(__file__).parents[2] / "configs" / "evidence" / "ablation.yaml"


def test_the_yaml_that_ships():
    ablation = Ablation.read(YAML, ["prospect", "word-of-class"], limit=3)
    assert list(ablation.jobs()) == [f"{name}-{i:02d}" for name in ("prospect", "word-of-class") for i in range(3)]
    assert ablation.overrides("prospect", 0) == {"model.params.frozen_dtype": "bfloat16"}
    picture, _ = concept_attributes(1, ablation.seed)
    shapes = ("circle", "square", "triangle", "star", "heart", "cross")
    assert ablation.overrides("word-of-class", 1)[INITIAL_WORDS] == [shapes[picture[2]]]


def test_one_value_for_each_concept():
    ablation = Ablation.read(YAML, ["prospect"], limit=2)
    measured = {}
    for job, same in zip(ablation.jobs(), (1, 0), strict=True):
        read = np.full((4, 6), 1 - same)
        reads = {f"read/{name}": read for name in (*TRANSFERS, "reconstruction")}
        measured[job] = reads | {"picture": np.zeros(6, int), "latent_distance": np.ones(4)}
    values = summary(ablation, measured, "prospect")
    assert values["reconstruction"].tolist() == [1, 0] and values["wanted/style"].tolist() == [1, 0]
    assert values["transferred/all"].tolist() == [0, 0]  # the first brings the unwanted, too


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, "There is no file of variants"),
        ("a: [", "not a readable YAML file"),
        ("config: x", "must have the keys"),
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
