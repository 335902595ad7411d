"""Read an embedding of another program, or the files of its stages, into one concept.

python scripts/import_embedding.py outputs/star/star-*.safetensors --out star.safetensors
python scripts/import_embedding.py embeddings_gs-599.pt --out teddy.safetensors
python scripts/import_embedding.py mapper-steps-500.pt learned_embeds-steps-500.bin --out teapot.safetensors
python scripts/import_embedding.py learned_embeds.bin --key "<cat-toy>" --out cat-toy.safetensors
python scripts/import_embedding.py logs/teddybear/checkpoints/adapter_gs-999 --caption teddybear --out teddy.safetensors
"""

from ldm.cli.flags import say
from ldm.cli.importing import run

if __name__ == "__main__":
    say(run(__doc__))
