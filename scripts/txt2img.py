"""Generate images from text, stage by stage.

  python scripts/txt2img.py --prompt "a large striped red star on the left on a navy background"
  python scripts/txt2img.py --concept models/demo/concepts/dotted-star.safetensors \\
      --preset material --prompt "a large * heart on a white background"
  python scripts/txt2img.py --from outputs/a-large-striped-red-star-on-the-left-on-42.png --seed 7
  python scripts/txt2img.py --config configs/stable-diffusion/v1-inference.yaml --ckpt models/sd/sd-v1-4.ckpt \\
      --prompt "a teddy walking in times square" --width 768
"""

from ldm.cli.flags import say
from ldm.cli.sample import run

if __name__ == "__main__":
    for path in run(__doc__):
        say(path)
