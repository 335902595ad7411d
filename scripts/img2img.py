"""Edit an image: noise it up to --strength and generate it again from text, stage by stage.

python scripts/img2img.py --content models/demo/references/dotted-star/dotted-star.png \\
    --strength 0.6 --prompt "a large striped red star on the left on a navy background"
python scripts/img2img.py --content models/demo/references/striped-heart/striped-heart.png \\
    --concept models/demo/concepts/dotted-star.safetensors --prompt "*"
"""

from ldm.cli.sample import run

if __name__ == "__main__":
    run(editing=True, docstring=__doc__)
