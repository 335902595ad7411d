"""The Hugging Face hub, played by a server on this machine: what is fetched, what is pushed, and what is said."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.cli import export, push, sample
from ldm.embeddings import Concept, EmbeddingError, load_concept, save_concept
from ldm.files.hub import fetch
from ldm.files.records import PNG_KEY, read_parameters, save_png
from ldm.page.form import Form
from ldm.request import ModelFacts

COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {file: content}}; `asked` are the paths of all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def fetched(self) -> list[str]:
        return sorted({path.rpartition("/")[2] for path in self.asked if "/resolve/" in path})


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/revision/(.+))?", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                self.send(b"{}", 404, X_Error_Code="RepoNotFound")
            elif found[2] not in (None, "main", COMMIT):
                self.send(b"{}", 404, X_Error_Code="RevisionNotFound")
            else:
                siblings = [{"rfilename": n, "size": self.server.sizes.get(n, len(c))} for n, c in files.items()]
                self.send(json.dumps({"id": found[1], "sha": COMMIT, "siblings": siblings}).encode())
        elif found := re.fullmatch(rf"/api/models/(\w+/[\w-]+)/tree/{COMMIT}", path):
            files = self.server.repositories[found[1]]
            listed = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
            self.send(json.dumps(listed).encode())
        elif found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/\w+/(.+)", path):
            content = self.server.repositories[found[1]][unquote(found[2])]
            self.send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self.send(b"{}", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Make a repository; what is put into it goes another way, see `hub`."""
        self.server.asked.append(f"{self.command} {self.path}")
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["name"]
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.send(b'{"error": "no"}', 401)
        else:
            self.server.repositories.setdefault(f"me/{name}", {})
            self.send(json.dumps({"url": f"{constants.ENDPOINT}/me/{name}"}).encode())


def answer_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    answer_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")

    def upload(_: HfApi, repo_id: str, folder_path: Path, commit_message: str) -> None:
        server.repositories[repo_id] |= {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def concept(tmp_path: Path) -> Path:
    vectors = torch.randn(10, 128, generator=torch.Generator().manual_seed(1))
    save_concept(Concept(vectors, {"base_model": "sd-v1-4.ckpt"}), tmp_path / "toy.safetensors", "<toy>")
    return tmp_path / "toy.safetensors"


def test_what_is_pushed_is_what_is_read(hub: Hub, concept: Path, tmp_path: Path) -> None:
    address, use = push.run([str(concept), "me/my-toy"])
    assert address == f"{constants.ENDPOINT}/me/my-toy"
    assert use == "prospect generate --concept hf:me/my-toy --prompt 'a <toy>'"
    files = hub.repositories["me/my-toy"]
    stages = {f"my-toy-{stage}.safetensors" for stage in range(10)}
    assert set(files) == {"README.md", "embeddings.safetensors", "my-toy_diffusers.py"} | stages
    card = files["README.md"].decode()
    for line in ("model: CompVis/stable-diffusion-v1-4", "base_model_relation: adapter", "instance_prompt: my-toy-0"):
        assert line in card
    hub.asked.clear()
    read = load_concept("hf:me/my-toy")
    assert torch.equal(read.vectors, load_concept(concept).vectors) and read.source == f"hf:me/my-toy@{COMMIT}"
    assert hub.fetched == sorted({"embeddings.safetensors"} | stages)
    hub.repositories["me/my-toy"] |= {"README.md": b"changed"}
    assert load_concept(read.source).identity == read.identity


def test_only_descriptions_and_tensors_are_fetched(hub: Hub, tmp_path: Path) -> None:
    save_file({"<cat>": torch.ones(1, 128)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    names = "learned_embeds.safetensors *.json evil.bin a.pt run.py token.json c.yaml deep/er.safetensors deep/x.json"
    hub.repositories["a/cat"] = dict.fromkeys(names.split(), content)
    read = load_concept("hf:a/cat@main")
    assert read.metadata["placeholder"] == "<cat>" and read.num_stages == 1
    assert hub.fetched == ["%2A.json", "c.yaml", "learned_embeds.safetensors", "token.json"]


def test_offline_uses_what_was_fetched(hub: Hub, concept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["a/toy"] = {"embeddings.safetensors": concept.read_bytes()}
    first = fetch("hf:a/toy")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf:a/toy") == first and not hub.asked
    with pytest.raises(ValueError, match="hub cannot be reached for 'hf:a/other'; check the network and HF_HUB_OFF"):
        fetch("hf:a/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answer_at("http://127.0.0.1:9", monkeypatch)  # nobody is there
    assert fetch("hf:a/toy") == first


def test_what_cannot_be_fetched(hub: Hub) -> None:
    hub.repositories |= {"a/toy": {"embeddings.safetensors": b""}, "a/pickled": {"learned_embeds.bin": b""}}
    hub.repositories["a/many"] = {"0.safetensors": b"", "1.safetensors": b""}
    hub.sizes |= {"0.safetensors": 90 << 20, "1.safetensors": 90 << 20}
    pickled = "no .safetensors file, and no other kind is fetched; download 'learned_embeds.bin' yourself"
    for source, sentence in {
        "hf:toy": "'hf:toy' must be hf:user/name, or hf:user/name@revision",
        "hf:a/../b": "must be hf:user/name",
        "hf:a/toy@../../../x": "must be hf:user/name",
        "hf:a/none": "The hub has no 'hf:a/none', or refuses it (status 404); check the name and what stands behind",
        "hf:a/toy@v9": "The hub has no 'hf:a/toy@v9', or refuses it",
        "hf:a/pickled": pickled,
        "hf:a/many": "'hf:a/many' is no concept: its files have 180 MB",
    }.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            fetch(source)
    assert not hub.fetched


def test_pushing_needs_a_name_and_a_login(
    hub: Hub, concept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    for flags, sentence in (
        ([str(concept), "toy"], "'toy' is no name of a repository; it must be user/name."),
        ([str(concept), "me/toy", "--outdir", str(tmp_path)], "is not an empty folder; name a new one with --outdir"),
        (["none.safetensors", "me/toy"], "There is no file 'none.safetensors', given with CONCEPT"),
        ([str(concept), "me/toy"], "(status 401); check the name and what stands behind an @, or log in with"),
    ):
        with pytest.raises(SystemExit):
            push.run(flags)
        assert sentence in capsys.readouterr().err
    assert not hub.repositories
    files = push.run([str(concept), "me/toy.v2", "--outdir", str(tmp_path / "out")])
    assert {Path(file).name for file in files} >= {"README.md", "embeddings.safetensors", "toy-v2-9.safetensors"}
    assert not hub.repositories and load_concept(tmp_path / "out").metadata["placeholder"] == "<toy>"


def test_an_image_of_a_concept_on_the_hub(hub: Hub, concept: Path, tmp_path: Path) -> None:
    hub.repositories["a/toy"] = {"embeddings.safetensors": concept.read_bytes()}
    flags = ["--prompt", "a <toy>", "--steps", "1", "--height", "32", "--width", "32", "--device", "cpu", "--any_base"]
    (image,) = sample.run([*flags, "--concept", "hf:a/toy", "--outdir", str(tmp_path)])
    assert read_parameters(image)["concepts"] == {"<toy>": f"hf:a/toy@{COMMIT}"}
    (again,) = sample.run(["--from", str(image), "--outdir", str(tmp_path / "b")])
    assert read_parameters(again)["concept_hashes"] == read_parameters(image)["concept_hashes"]


@pytest.mark.parametrize("source", ["hf:a/toy", f"hf:a/toy@{COMMIT}", "hf:a/toy@main", "hf:../x@y", "hf:"])
def test_an_image_of_a_stranger_fetches_nothing(
    hub: Hub, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"prompt": "a <toy>", "concepts": {"<toy>": source}, "ddim_steps": 1, "height": 32, "width": 32}
    image = tmp_path / "image.png"
    save_png(Image.new("RGB", (32, 32)), image, {PNG_KEY: json.dumps(record)})
    flags = ["--from", str(image), "--ckpt", "models/demo/model.safetensors", "--outdir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        sample.run(flags)
    assert "was not fetched before, and an image's record fetches nothing; if you trust it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was not fetched before"):
        Form.restored(record, ModelFacts(size_unit=32))
    assert not hub.asked


def test_the_layout_of_sd_concepts_library(tmp_path: Path) -> None:
    folder = tmp_path / "cat-toy"
    folder.mkdir()
    (folder / "token_identifier.txt").write_text("<cat-toy>\n")
    (folder / "type_of_concept.txt").write_text("object")
    torch.save({"<cat-toy>": torch.ones(128)}, folder / "learned_embeds.bin")
    assert load_concept(folder).metadata == {"placeholder": "<cat-toy>"}
    assert load_concept(folder / "learned_embeds.bin").metadata == {"placeholder": "<cat-toy>"}
    (folder / "learned_embeds.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
    with pytest.raises(EmbeddingError, match="could run code and is not loaded"):
        load_concept(folder)


def test_kohyas_xti_file_is_a_concept_of_layers(tmp_path: Path) -> None:
    names = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{k:02}" for k in range(3, 12))]
    vectors = torch.randn(16, 2, 768, generator=torch.Generator().manual_seed(0))
    save_file(dict(zip(names, vectors.clone().half(), strict=True)), tmp_path / "xti.safetensors")
    torch.save(dict(zip(reversed(names), vectors.flip(0)[:, 0], strict=True)), tmp_path / "xti.pt")
    two, one = load_concept(tmp_path / "xti.safetensors"), load_concept(tmp_path / "xti.pt")
    assert (two.method, one.method) == ("xti", "xti")
    assert torch.equal(two.tensors["table"], vectors.half().float()[None])
    assert torch.equal(one.tensors["table"], vectors[None, :, :1])
    save_concept(one, tmp_path / "own.safetensors")
    assert load_concept(tmp_path / "own.safetensors").identity == one.identity
    flags = [str(tmp_path / "xti.safetensors"), "--name", "cat", "--to", "kohya", "--outdir", str(tmp_path / "out")]
    written = load_file(*export.run(flags))
    assert list(written) == names and torch.equal(torch.stack(list(written.values())), two.table[0])
    assert load_concept(tmp_path / "out/cat.safetensors").identity == two.identity


def test_onetrainers_output_embedding_is_named(tmp_path: Path) -> None:
    save_file({"emp_params": torch.ones(1, 768), "emp_params_out": torch.ones(1, 768)}, tmp_path / "o.safetensors")
    with pytest.raises(EmbeddingError, match="it is OneTrainer's with an output embedding .emp_params_out., which is"):
        load_concept(tmp_path / "o.safetensors")
    assert load_concept(tmp_path / "o.safetensors", key="emp_params").num_stages == 1
