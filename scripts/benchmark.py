"""Measure training steps, sampling, text passes, the first stage, or loading, in several ways side by side.

  python scripts/benchmark.py --what train --mode reference
  python scripts/benchmark.py --what sample --off kv text_batch --peer diffusers
  python scripts/benchmark.py --size sd-v1 --device cuda --on float16 channels_last cuda_graph --peer diffusers-compiled

All rows work on the same weights and inputs. Their results are compared first (deviation: relative distance to the
first row's), then they are timed in turns, A B A B. Exit code 1 says that results differ by more than their
precision explains.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.benchmark.command import main

if __name__ == "__main__":
    table, agree = main(__doc__)
    print(table)
    if not agree:
        sys.exit("The results differ by more than their precision explains: these times mean nothing.")
