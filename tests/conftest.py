"""Makes `tests/` importable and keeps every test on one thread: recorded numbers come back exactly."""

import os
import sys
from pathlib import Path

# Before torch is imported: OpenMP reads this once, and two spinning threads on a busy machine are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

torch.set_num_threads(1)
