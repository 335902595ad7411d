"""Two threads with one model, and two threads that read files at once."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file
from torch import nn

from ldm.checkpoint import CheckpointError, read_state_dict
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.generate import main

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads take turns as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*works: Callable[[], object]) -> list:
    """The results of functions that are begun at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], object]) -> object:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


@pytest.mark.parametrize("fixed", [False, True])
def test_threads_do_not_mix_their_stages(demo_model: "LatentDiffusion", tmp_path: Path, fixed: bool) -> None:
    """Two prompts by stages, with concepts of the same name from two files: as in one thread, bit for bit.

    Also where the U-Net reads from buffers, which both threads write into: on the CPU, `cuda_graph` without a graph.
    """
    width = demo_model.embedding_manager.width
    jobs = []
    for number, words in enumerate((["a * star"] * 5 + ["a blue circle"] * 5, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])):
        vectors = torch.randn(10, width, generator=torch.Generator().manual_seed(number))
        save_concept(Concept(vectors), tmp_path / f"{number}.safetensors")
        jobs.append({"prompt": "*", "prospect_words": words, "concepts": {"*": tmp_path / f"{number}.safetensors"}})

    def pictures(job: dict[str, object], count: int = 2) -> list[tuple[bytes, object]]:
        made = [
            main(**job, model=demo_model, ddim_steps=10, scale=2.0, height=64, width=64, seed=seed, progress=False)
            for seed in range(count)
        ]
        return [(picture.tobytes(), picture.info["prospect"]) for picture in made]

    demo_model.accelerate(cuda_graph=fixed)
    alone = [pictures(job) for job in jobs]
    assert alone[0][0] != alone[1][0]
    demo_model.accelerate(cuda_graph=fixed)  # the buffers, too, are made while both run
    try:
        assert together(*(lambda job=job: pictures(job) for job in jobs)) == alone
    finally:
        demo_model.accelerate()


class Foreign(nn.Module):
    """What a file may not name."""


def test_threads_that_read_do_not_lend_each_other_names(tmp_path: Path) -> None:
    """Files may name modules of PyTorch, which are read as data, and no others, whatever another thread reads."""
    parameters = nn.ParameterDict({f"{i}": nn.Parameter(torch.ones(4)) for i in range(300)})
    torch.save({"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 4))}), "rest": parameters},
               tmp_path / "embedding.pt")  # fmt: skip
    torch.save({"state_dict": {"a": torch.ones(1)}, "rest": [Foreign()] * 2}, tmp_path / "weights.ckpt")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "plain.ckpt")
    done = threading.Event()

    def embeddings() -> int:
        try:
            for _ in range(40):
                assert torch.equal(load_concept(tmp_path / "embedding.pt").vectors, torch.ones(1, 4))
        finally:
            done.set()
        return 40

    def weights() -> int:
        refused = 0
        while not done.is_set():
            with pytest.raises(CheckpointError, match="Foreign"):
                read_state_dict(tmp_path / "weights.ckpt")
            assert list(read_state_dict(tmp_path / "plain.ckpt")) == ["a"]
            refused += 1
        return refused

    both = together(embeddings, weights)
    assert both[0] == 40 and both[1] > 0
    names = [entry for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)]
    assert names == [], "nothing stays on the list"


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def write(value: float) -> None:
        for _ in range(50):
            save_concept(Concept(torch.full((10, 8), value)), path)

    together(lambda: write(1.0), lambda: write(2.0))
    assert load_file(path)["*"].unique().tolist() in ([1.0], [2.0])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_do_not_spin(given: dict[str, str], policy: str) -> None:
    """Said before torch is imported, which is when OpenMP reads it; spinning threads crawl on a busy machine."""
    source = "import main, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [policy, "False"], result.stderr
