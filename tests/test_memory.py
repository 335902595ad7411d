"""The estimate of memory: near the measured peak, compared with what is free, and told before work starts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bad_files import CONFIG, MODEL, ROOT, STAR

import main
from ldm import memory
from ldm.cli import sample as commands
from ldm.config import instantiate_from_config, load_config
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.models.diffusion.ddpm import LatentDiffusion

GIGABYTE = 2**30

# Peaks of one process each: what was measured and what was estimated, in bytes.
MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from ldm import memory
from ldm.config import instantiate_from_config, load_config
from ldm.generate import load_model_from_config, main

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def peak(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

def generating(size, n_samples):
    model = load_model_from_config("configs/demo/finetune.yaml", "models/demo/model.safetensors", device="cpu")
    def make(size, count):
        main("a star", model=model, ddim_steps=1, height=size, width=size, n_samples=count, progress=False)

    make(32, 1)  # what is imported and allocated once
    return peak(lambda: make(size, n_samples)), memory.generating(model, size, size, n_samples)

def learning(size, batch_size, use_checkpoint):
    overrides = ["model.params.ckpt_path=models/demo/model.safetensors"]
    overrides += [f"model.params.unet_config.params.use_checkpoint={use_checkpoint}"]
    model = instantiate_from_config(load_config("configs/demo/finetune.yaml", overrides=overrides).model).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-4)

    def step(size, count):
        z = torch.randn(count, 4, size // 8, size // 8)
        cond = model.get_learned_conditioning(["*"] * count)
        model.p_losses(z, cond, torch.randint(0, 1000, (count,)), torch.randn_like(z))[0].backward()
        optimizer.step()

    step(32, 1)
    return peak(lambda: step(size, batch_size)), memory.learning(model, size, batch_size)

torch.set_num_threads(1)
print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        ("generating", (256, 1)),
        ("generating", (256, 4)),
        ("learning", (256, 2, "false")),
        ("learning", (256, 4, "true")),
    ],
)
def test_the_estimate_is_within_its_margin_of_the_peak(work: str, arguments: tuple) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # glibc gives freed tensors back at once: memory is countable
    command = [sys.executable, "-c", MEASURE, work, json.dumps(arguments)]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    measured, estimated = json.loads(output)
    assert measured > 30e6
    assert 1 / memory.MARGIN < measured / estimated < memory.MARGIN, (measured, estimated)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        model = load_model_from_config(CONFIG, MODEL, device="cpu")
        model.cond_stage_model.tokenizer  # noqa: B018, opened while its folder is found
        return model


def test_the_estimate_grows_with_pixels_and_samples(model: LatentDiffusion) -> None:
    one = memory.generating(model, 64, 64, 1)
    assert memory.generating(model, 128, 64, 1) == pytest.approx(2 * one)
    assert memory.generating(model, 64, 64, 5) == pytest.approx(5 * one)
    assert memory.generating(model, 64, 64, 1, n_iter=101) == one + 100 * 2 * 3 * 64 * 64
    assert memory.learning(model, 64, 16) == pytest.approx(2 * memory.learning(model, 64, 8))


def test_half_precision_and_checkpointing_help() -> None:
    def learning(**params: object) -> float:
        overrides = [f"model.params.{key}={value}" for key, value in params.items()]
        config = load_config(CONFIG, overrides=overrides)
        with torch.device("meta"):
            return memory.learning(instantiate_from_config(config.model), 128, 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("ldm.modules.embedding_manager.initial_embedding", lambda *_: torch.zeros(1, 128, device="meta"))
        full, half = learning(), learning(frozen_dtype="float16")
        checkpointed = learning(**{"unet_config.params.use_checkpoint": "true"})
    assert half < 0.7 * full and checkpointed < 0.6 * full


def test_counting_leaves_the_model_as_it_is(model: LatentDiffusion) -> None:
    """Also while another thread uses it."""
    before = {name: (p.data_ptr(), p.device.type) for name, p in model.named_parameters()}
    pictures: list[bytes] = []

    def make() -> None:
        picture = generate("a star", model=model, ddim_steps=4, height=32, width=32, progress=False)
        pictures.append(picture.tobytes())

    thread = threading.Thread(target=make)
    thread.start()
    while thread.is_alive():
        memory._counted.clear()
        memory.generating(model, 32, 32, 1)
    make()
    assert pictures[0] == pictures[1]
    assert before == {name: (p.data_ptr(), p.device.type) for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("share", "outcome"), [(2.0, ""), (1.01, ""), (0.8, "warned"), (0.51, "warned"), (0.4, "refused")]
)
def test_what_is_free_decides(
    share: float,
    outcome: str,
    model: LatentDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    needed = memory.generating(model, 32, 32, 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(share * needed))
    steps: list[int] = []
    arguments = {"model": model, "ddim_steps": 1, "height": 32, "width": 32, "progress": False}
    try:
        generate("a star", callback=lambda *_: steps.append(1), **arguments)
    except memory.MemoryShort as error:
        assert outcome == "refused" and not steps
        text = str(error)
    else:
        assert outcome != "refused" and steps
        text = " ".join(caplog.messages)
    assert len(caplog.messages) == (outcome == "warned")
    assert all(word in text for word in ("--height", "--n_samples", "--dtype float16", "free (cpu)")) == bool(outcome)


def test_unknown_memory_stops_nothing(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    memory.check_generating(model, "mps", height=10**6, width=10**6, n_samples=1, n_iter=1)


def test_loading_is_refused_before_the_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**7)
    monkeypatch.setattr("ldm.models.diffusion.ddpm.read_state_dict", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(memory.MemoryShort, match="The model needs about .* of memory, and 10 MB are free .*float16"):
        load_model_from_config(CONFIG, MODEL, device="cpu")


def test_learning_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**8)
    flags = ["-t", "--base", str(CONFIG), "--actual_resume", str(MODEL), "--data_root", str(STAR), "-l", str(tmp_path)]
    assert main.main([*flags, "data.params.batch_size=64", "--max_steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "Learning from 128 x 128 pixels, 64 at a time, needs about" in error
    assert "frozen_dtype=float16" in error and "use_checkpoint=true" in error and "batch_size" in error
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ldm.generate.load_model_from_config", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(SystemExit):
        commands.run("", argv=["--prompt", "a star", "--height", "100000", "--width", "100000", "--device", "cpu"])
    assert "pictures of 100000 x 100000 needs about" in capsys.readouterr().err


# What is free


def test_free_memory_is_what_the_system_says() -> None:
    free = memory.free_memory()
    if Path("/proc/meminfo").exists():
        assert 0 < free < 2**50
    assert memory.free_memory("mps") is None


def test_containers_limits_count(tmp_path: Path) -> None:
    """Control groups of version 2, of a parent, and of version 1."""

    def group(folder: Path, **numbers: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, number in numbers.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{number}\n")

    listing = tmp_path / "cgroup"
    listing.write_text("0::/a/b\n")
    group(tmp_path / "2/a/b", memory_max="max", memory_current=3)
    group(tmp_path / "2/a", memory_max=GIGABYTE, memory_current=GIGABYTE // 4)
    assert memory._group_limits(str(tmp_path / "2"), str(listing)) == [GIGABYTE * 3 // 4]
    files = f"anon 7\ninactive_file {GIGABYTE // 8}\nactive_file {GIGABYTE // 16}\nbad\n"
    (tmp_path / "2/a/memory.stat").write_text(files)  # given up when memory is needed
    assert memory._group_limits(str(tmp_path / "2"), str(listing)) == [GIGABYTE * 15 // 16]
    listing.write_text("4:cpu,memory:/not/here\n")
    group(tmp_path / "1/memory", memory_limit_in_bytes=100, memory_usage_in_bytes=120)
    assert memory._group_limits(str(tmp_path / "1"), str(listing)) == [0]
    (tmp_path / "1/memory/memory.stat").write_text("inactive_file 9\ntotal_inactive_file 30\ntotal_active_file 200\n")
    assert memory._group_limits(str(tmp_path / "1"), str(listing)) == [100]
    assert memory._group_limits(str(tmp_path / "none"), str(listing)) == []


@pytest.mark.gpu
def test_free_memory_of_a_gpu() -> None:
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    before = memory.free_memory("cuda")
    del held  # stays with PyTorch, which gives it out again
    assert memory.free_memory("cuda") >= before + 2**28 > torch.cuda.mem_get_info()[0]


def test_the_first_stage_keeps_no_pairs_of_positions(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gets tensors that the fused kernels take: with others, memory grows with the square of the pixels."""
    seen: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: bool) -> torch.Tensor:
        seen.append(all(x.stride(-1) == 1 for x in (q, k, v)))
        return attention(q, k, v, **options)

    monkeypatch.setattr("ldm.modules.diffusionmodules.model.F.scaled_dot_product_attention", watched)
    model.decode_first_stage(torch.zeros(1, 4, 8, 8))
    assert seen == [True]


def test_warnings_name_the_work(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * GIGABYTE)
    with caplog.at_level(logging.WARNING):
        memory.check(4 * GIGABYTE, "cpu", "The work", "less of it")
    assert caplog.messages == [
        "The work needs about 4.0 GB of memory, and 3.0 GB are free (cpu): it may not fit; these help: less of it."
    ]
