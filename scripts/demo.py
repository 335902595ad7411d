"""Learn two concepts with the small model that ships, then execute the notebook with them.

make demo       python scripts/demo.py
make concepts   python scripts/demo.py --concepts: learn every reference image, for models/demo/concepts
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from ldm.cli.flags import script_parser

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = ("dotted-star", "striped-heart")
NOTEBOOK = "ProSpect.ipynb"
OUTPUTS = Path("outputs")
FAST = "configs/demo/fast.yaml"
REFERENCES, SHIPPED = Path("models/demo/references"), Path("models/demo/concepts")


class ThisPython(KernelSpecManager):
    """Every kernel is the interpreter that runs this, whatever kernels are installed for the user."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        # it listens on this machine only, and would warn that it does not encrypt
        return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=ERROR"]))


def execute(notebook: Path, executed: Path, folder: Path = ROOT, timeout: int = 600) -> None:
    """Run all cells in `folder` and write the notebook with what they showed, up to the cell that failed if one did.

    Args:
        timeout: seconds for each cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as sockets:
        manager = AsyncKernelManager(
            kernel_spec_manager=ThisPython(),
            # sockets in a folder: no network is needed, not even this machine's own; Windows has no such sockets
            transport="tcp" if sys.platform == "win32" else "ipc",
            connection_file=str(Path(sockets) / "kernel.json"),
        )
        client = NotebookClient(content, km=manager, timeout=timeout, resources={"metadata": {"path": str(folder)}})
        try:
            client.execute(cleanup_kc=True)  # the kernel ends with the notebook
        finally:
            executed.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(content, executed)


def learn(concept: str, *more: str) -> Path:
    """Learn one reference image with `main.py`, with `more` configurations; returns the embedding file."""
    run = Path("logs") / "demo" / concept
    command = ["main.py", "--base", "configs/demo/finetune.yaml", *more, "-t"]
    command += ["--actual_resume", "models/demo/model.safetensors"]
    command += ["--data_root", (REFERENCES / concept).as_posix(), "-p", run.as_posix()]
    shutil.rmtree(ROOT / run, ignore_errors=True)  # of an earlier demo
    print(f"Learning '{concept}' from one image: python {' '.join(command)}", flush=True)
    exit_code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if exit_code:
        sys.exit(exit_code)
    return run / "checkpoints" / "embeddings.safetensors"


def ship() -> None:
    """Learn every reference image anew and keep the concepts beside the model they were learned for."""
    (ROOT / SHIPPED).mkdir(exist_ok=True)
    for reference in sorted(path.name for path in (ROOT / REFERENCES).iterdir() if path.is_dir()):
        shutil.copyfile(ROOT / learn(reference), ROOT / SHIPPED / f"{reference}.safetensors")
        print(f"Concept:  {SHIPPED / reference}.safetensors", flush=True)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--concepts", action="store_true", help=f"learn the concepts of {SHIPPED} instead")
    if parser.parse_strictly().concepts:
        ship()
        return
    start = time.monotonic()
    learned = [learn(concept, FAST) for concept in CONCEPTS]
    os.environ |= dict(zip(("PROSPECT_CONCEPT", "PROSPECT_CONCEPT_2"), map(str, learned), strict=True))
    print(f"Executing {NOTEBOOK}", flush=True)
    before = time.time()
    executed = ROOT / OUTPUTS / NOTEBOOK
    execute(ROOT / NOTEBOOK, executed)
    images = sorted(path for path in executed.parent.glob("*.png") if path.stat().st_mtime >= before - 1)
    print(f"Learned:  {', '.join(map(str, learned))}")
    print(f"Notebook: {OUTPUTS / NOTEBOOK}")
    print(f"Images:   {OUTPUTS}: {', '.join(path.name for path in images)}")
    print(f"Done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
