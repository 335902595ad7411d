"""Export learned concepts to diffusers, AUTOMATIC1111's web UI and ComfyUI, a file for each stage.

  python scripts/export_embedding.py models/demo/concepts/dotted-star.safetensors --name star \\
      --to diffusers a1111 comfyui --preset material --prompt "a large * heart on a black background"
  python scripts/export_embedding.py "<a>=star.safetensors" "<b>=heart.safetensors" --name star heart \\
      --to a1111 --prompt "a <a> beside a <b>" --steps 20 --sampler "DPM++ 2M Karras" --card
"""

from ldm.cli.export import run
from ldm.cli.flags import say

if __name__ == "__main__":
    for path in run(__doc__):
        say(path)
