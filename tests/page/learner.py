"""A stand-in for `prospect learn`, in a blink: the run folder grows as its does, and Ctrl-C ends it as it ends that."""

import argparse
import signal
import sys
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import load_file, save_file

STAR = Path(__file__).parents[2] / "models/demo/concepts/dotted-star.safetensors"

parser = argparse.ArgumentParser()
parser.add_argument("-p", "-r", dest="folder", type=Path)
parser.add_argument("--max_steps", type=int)
options, _ = parser.parse_known_args()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background would not have it
code = step = 0
(options.folder / "configs").mkdir(parents=True, exist_ok=True)
(options.folder / "configs/1-lightning.yaml").write_text(f"lightning: {{trainer: {{max_steps: {options.max_steps}}}}}")
try:
    metrics = options.folder / "csv/version_0/metrics.csv"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text("step,train/loss\n")
    for step in range(5, options.max_steps + 1, 5):
        with metrics.open("a") as stream:
            stream.write(f"{step - 1},{1 / step}\n")
        time.sleep(0.05 if options.max_steps > 30 else 0)
    step = options.max_steps
except KeyboardInterrupt:
    code = 130
(options.folder / "checkpoints").mkdir(exist_ok=True)
with safe_open(STAR, "np") as star:
    said = star.metadata() | {"step": str(step)}
save_file(load_file(STAR), options.folder / "checkpoints/embeddings.safetensors", said)
sys.exit(code)
