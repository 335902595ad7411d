"""Learn a concept from each of many folders of images, on all cores, on all GPUs, or on a Ray cluster.

  python scripts/learn_many.py IMAGES --out CONCEPTS
  python scripts/learn_many.py concepts.csv --out CONCEPTS --workers 4 --max_steps 75
  python scripts/learn_many.py IMAGES --out CONCEPTS --base sd --ckpt sd-v1-4.ckpt --cluster auto

IMAGES is a folder in which each sub-folder (or, if there is none, each image) is a concept, or a CSV with the columns
image, name, init_word, method, steps, of which only image is needed. The same command again does what is left.
CONCEPTS then holds a file for each concept, concepts.csv, and the contact sheet concepts.png.
"""

import sys

from ldm.many.command import run

if __name__ == "__main__":
    sys.exit(run(__doc__))
