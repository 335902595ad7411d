"""Open the page in a browser: generate, learn, compare and export. It answers to this machine alone.

python scripts/page.py
python scripts/page.py --config configs/stable-diffusion/v1-inference.yaml --ckpt models/sd/sd-v1-4.ckpt
"""

from ldm.page.command import run

if __name__ == "__main__":
    run(__doc__)
