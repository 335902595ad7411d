"""Many concepts, in processes of this machine and on a Ray cluster: each ends as if it were learned alone."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from runs import CONFIG, MODEL, NO_PICTURES, ROOT, every, learn, start, wait_for

from ldm.embeddings import load_concept
from ldm.files.writing import lock
from ldm.many import command
from ldm.many.cluster import connected, learn_here, learn_on, run_on
from ldm.many.contact_sheet import write_table
from ldm.many.jobs import LEFT, Job, Setting, finished, noted, read_jobs, unfinished
from ldm.many.learn import learn_locally, learn_many

COUNT, STEPS = 8, 4
SETTING = Setting((CONFIG,), MODEL, (NO_PICTURES, "data.params.batch_size=2"))


def image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a folder of images for each concept."""
    for number in range(COUNT):
        (tmp_path / f"pictures/c{number}").mkdir(parents=True)
        image(number).save(tmp_path / f"pictures/c{number}/image.png")
    return tmp_path / "pictures"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder in which nothing is to be left."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    assert not (tmp_path / "home" / ".ray").exists()


def kill_once(log: Path) -> threading.Thread:
    """Kill the process that writes to `log`, while it learns."""

    def kill() -> None:
        wait_for(lambda: log.is_file() and "Logging to" in log.read_text(), 300)
        for process in psutil.process_iter():
            if process.pid == os.getpid():  # holds it open, too
                continue
            try:
                if any(file.path == str(log) for file in process.open_files()):
                    process.send_signal(signal.SIGKILL)
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("cluster", [None, "local"])
def test_all_come_although_one_process_is_killed(cluster: str | None, pictures: Path, tmp_path: Path, home: Path):
    out = tmp_path / "out"
    jobs = unfinished(read_jobs(pictures, {"steps": STEPS}), SETTING, out)
    killer = kill_once(out / "runs/c2.log")
    results = list(learn_many(jobs, SETTING, out, 2, cluster, 1.0))
    killer.join()
    assert sorted(result.job.name for result in results) == [f"c{i}" for i in range(COUNT)]
    assert not [result.error for result in results if result.error]
    assert (out / "runs/c2.log").read_text().count("Logging to") == 2
    for name in ("c2", "c5"):
        overrides = ("--max_steps", str(STEPS), *SETTING.overrides)
        alone = learn(tmp_path / f"alone-{name}", "--data_root", str(pictures / name), *overrides)
        found, expected = (load_concept(f) for f in (out / f"{name}.safetensors", alone / "embeddings.safetensors"))
        assert np.array_equal(found.vectors, expected.vectors)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="ray start")
def test_two_ray_nodes_share_the_work(pictures: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_command = str(Path(sys.executable).with_name("ray"))
    options = ["--num-cpus=1", "--disable-usage-stats"]
    head = [ray_command, "start", "--head", "--port=26379", "--include-dashboard=false", *options]
    try:
        subprocess.run(head, check=True, capture_output=True, cwd=ROOT)
        second = [ray_command, "start", "--address=127.0.0.1:26379", *options]
        subprocess.run(second, check=True, capture_output=True, cwd=ROOT)
        with connected("127.0.0.1:26379") as ray:
            wait_for(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 2)

            def node_of_task(_: int) -> str:  # defined here, since the workers do not find this module
                time.sleep(1)
                return ray.get_runtime_context().get_node_id()

            places = dict(run_on(ray, node_of_task, {i: (i,) for i in range(6)}))
            assert len(set(places.values())) == 2
            out = tmp_path / "out"
            jobs = unfinished(read_jobs(pictures, {"steps": STEPS}), SETTING, out)[:2]
            assert not [found.error for found in learn_on(ray, jobs, SETTING, out, 1.0) if found.error]
    finally:
        subprocess.run([ray_command, "stop", "--force"], check=False, capture_output=True)
    assert finished(out, jobs[1]).is_file()


def test_a_failing_concept_stops_no_other_and_what_is_there_is_not_learned_again(pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    jobs = read_jobs(pictures, {"steps": 1})[:2]
    jobs[0] = Job(jobs[0].image, "fails", init_word="red circle", method="neti", steps=1)
    first = {found.job.name: found for found in learn_locally(unfinished(jobs, SETTING, out), SETTING, out, 2, [])}
    assert "must be a word of one token" in first["fails"].error
    assert finished(out, jobs[1]).is_file() and not finished(out, jobs[0]).exists()
    assert unfinished(jobs, SETTING, out) == jobs[:1]
    table = write_table(jobs, list(first.values()), out)
    assert "learned" in table and "word of one token" in (out / "concepts.csv").read_text()
    with pytest.raises(ValueError, match="'c1' was started in .* with other images or settings"):
        unfinished([Job(jobs[1].image, "c1", steps=2)], SETTING, out)
    image(99).save(jobs[1].image / "another.png")
    with pytest.raises(ValueError, match="'c1'"):
        unfinished(jobs, SETTING, out)


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_same_command_goes_on(number: int, pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    for name in [f"c{i}" for i in range(1, COUNT)]:
        shutil.rmtree(pictures / name)
    flags = [str(pictures), "--out", str(out), "--no_sheet", "--set", *every(2)]
    process = start("scripts/learn_many.py", *flags, "--max_steps", "2000", stderr=subprocess.PIPE)
    log = out / "runs/c0.log"
    wait_for((out / "runs/c0/checkpoints/last.ckpt").is_file)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "0 of 1 concepts are learned; the same command resumes" in errors
    assert "resume with" in log.read_text()


BAD = {
    "image\nnowhere.png": "line 2: there is no image 'nowhere.png'",
    "image,stepz\nc0,3": "unknown column 'stepz'.*steps",
    "picture\nc0": "no column image",
    "image,image\nc0,c1": "two columns of one name",
    "image,steps\nc0,0": "steps must be a whole number",
    "image,steps\nc0," + "9" * 5000: "steps must be a whole number of at least 1, not '9{60}…'",
    "image,method\nc0,nety": "concept 'c0': .*'nety', which is unknown here; known: .*neti",
    "image,method\nc0,ldm.methods.neti.NeTIMapper": "'ldm.methods.neti.NeTIMapper' is no method",
    "image,name\nc0,x\nc1,X": "'x' of '.*c0' and 'X' of '.*c1' are the same files",
    "image,name\nc0,\u00e9\nc1,e\u0301": "are the same files",
    "image,name\nc0,x\nc1,x.json": "are the same files",
    "image,name\nc0,x,y": "line 2: it has more values than there are columns",
    "image,name\n,x": "line 2: there is no image ''",
    f"image\n{'x' * 5000}": "line 2: there is no",
    f'image\n"{"x" * 200_000}"': "line 1: field larger than field limit",
    "image\nc0\0": "is not UTF-8 text .line 2.",
    "image": "nothing to learn",
} | {
    f'image,name\nc0,"{name}"': "cannot be a file's name"
    for name in ("../x", "/x", "a\\b", "CON", "nul.txt", "a.", "a\x1b[31m", "a\u202eb", "x" * 101, "-a", "*", "${x}")
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_csv_is_refused_with_its_line(text: str, pictures: Path):
    (pictures / "jobs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=BAD[text]) as caught:
        read_jobs(pictures / "jobs.csv")
    assert "jobs.csv" in str(caught.value) or "same files" in str(caught.value)


def test_nothing_of_others_is_taken_or_overwritten(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    jobs, out = read_jobs(pictures)[:1], tmp_path / "out"
    out.mkdir()
    for name in ("concepts.csv", "concepts.png", "c0.safetensors"):
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"'.*{name}' is there already and was not"):
            unfinished(jobs, SETTING, out)
        (out / name).unlink()
    unfinished(jobs, SETTING, out)
    with pytest.raises(ValueError, match="'c0' was started in .* with other images or settings"):
        unfinished(jobs, replace(SETTING, ckpt=ROOT / "models/demo/clip.safetensors"), out)
    (out / "runs/c0.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="'c0' was started"):
        unfinished(jobs, SETTING, out)
    with pytest.raises(SystemExit):
        command.run([str(pictures), "--out", str(pictures / "out")])
    assert "is part of IMAGES" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_process_that_was_left_behind_is_not_joined_by_another(pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    jobs = unfinished(read_jobs(pictures)[:1], SETTING, out)
    with (out / "runs/c0.log").open("ab") as log, subprocess.Popen(["sleep", "60"], stdout=log) as left:
        assert lock(log)
        log.close()
        (found,) = learn_locally(jobs, SETTING, out, 1, [])
        on_cluster, _ = learn_here(jobs[0], SETTING, (None, (), None), str(out), noted(out, jobs[0]).read_text())
        left.kill()
    assert found.error == on_cluster.error == LEFT


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_drive_without_locks_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "c0.log").open("ab") as log:
        assert lock(log)


def test_jobs_come_from_folders_images_and_tables(pictures: Path):
    assert [job.name for job in read_jobs(pictures)] == [f"c{i}" for i in range(COUNT)]
    assert [job.name for job in read_jobs(pictures / "c0")] == ["image"]
    (pictures / "jobs.csv").write_text(
        "\ufeffimage,name,init_word,method,steps\nc0,cat,star,neti,7\nc1/image.png,,,,\n"
    )
    jobs = read_jobs(pictures / "jobs.csv", {"method": "xti"})
    assert jobs[0] == Job(pictures / "c0", "cat", "star", "neti", 7)
    assert jobs[1] == Job(pictures / "c1/image.png", "image", None, "xti", None)
    with pytest.raises(ValueError, match="nothing to learn in '.*nowhere'; give a folder .* or a .csv file"):
        read_jobs(pictures / "nowhere")


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r'--cluster needs Ray: pip install "prospect-ldm\[cluster\]"'),
        connected("local"),
    ):
        pass
