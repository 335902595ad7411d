"""The prompt encoder of Stable Diffusion v1: CLIP's tokenizer and text transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.conditioning.learned import TokenVectors
from ldm.config import nearest
from ldm.files.shipped import shipped
from ldm.files.texts import read_text
from ldm.modules.diffusionmodules.util import enter, leave
from ldm.modules.encoders.clip import NO_PREFIX, CLIPTextConfig, CLIPTextModel, KeyValue, LogitBias

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

END_MARKS = ("<|startoftext|>", "<|endoftext|>")
FILES = ["vocab.json", "merges.txt", "tokenizer_config.json"]
KNOWN_VERSIONS = {"openai/clip-vit-large-patch14": CLIPTextConfig()}


class FrozenCLIPEmbedder(nn.Module):
    """Token ids and learned vectors to contexts; parameters as in the reference's `cond_stage_config`.

    Args:
        version: name of a known text transformer; with `text_config` any name is accepted.
        max_length: L, the tokens of a prompt with its two end marks.
        text_config: sizes, as the fields of `CLIPTextConfig`.
        tokenizer: folder with `vocab.json` and `merges.txt`, relative to the current folder, or one that ships;
            None takes `version` from the hub's cache.

    Raises:
        ValueError: an unknown version without `text_config`, or more tokens than the transformer has positions.
    """

    # From this many values (tokens x D) on, the tokens before the first learned one are computed once for all U-Net
    # layers; below, joining the parts costs more than it saves (docs/benchmarks.md). None: never.
    share_rows_from: int | None = 2**11
    ignored_keys = {"device": "the model follows the device of the trainer or of the sampler"}

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if text_config is None and version not in KNOWN_VERSIONS:
            raise ValueError(f"Unknown text encoder '{version}'{nearest(version, list(KNOWN_VERSIONS))}")
        config = KNOWN_VERSIONS[version] if text_config is None else CLIPTextConfig(**text_config)
        if max_length > config.max_position_embeddings:
            raise ValueError(f"max_length {max_length} exceeds the {config.max_position_embeddings} positions.")
        self.version = version
        self.max_length = max_length
        self.tokenizer_folder = tokenizer
        self.transformer = CLIPTextModel(config)

    @property
    def width(self) -> int:
        return self.transformer.config.hidden_size

    @property
    def token_table(self) -> Tensor:
        """Token embeddings (vocabulary, D)."""
        return self.transformer.text_model.token_table

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """CLIP's BPE, opened at the first use; no network is used when the files are on this machine."""
        folder = hub_folder(self.version) if self.tokenizer_folder is None else Path(shipped(self.tokenizer_folder))
        return open_tokenizer(folder, self.transformer.config.vocab_size)

    @cached_property
    def known_words(self) -> tuple[list[str], list[str]]:
        """The words of a small world, from words.txt beside its vocabulary: those that captions differ in, and others.

        Both are empty where prompts may say anything.
        """
        path = Path(shipped(self.tokenizer_folder or "")) / "words.txt"
        if self.tokenizer_folder is None or not path.is_file():
            return [], []
        first, _, others = read_text(path, "cond_stage_config.params.tokenizer").partition("\n")
        return first.split(), others.split()

    def embed(self, slots: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the input embeddings (layers, N, L, D) of slots (N, L): a token id, or -(r + 1) for row r of vectors.

        Args:
            vectors: (layers, 1, R, D) for all rows of slots, or (layers, N, R, D), a table for each.
        """
        table = self.token_table
        inputs = nn.functional.embedding(slots.clamp(min=0), table)[None]
        if vectors is None:
            return inputs
        learned = at_slots(enter(vectors, table.dtype), slots)
        return torch.where((slots < 0).unsqueeze(-1), learned, inputs)

    def encode(
        self,
        slots: Tensor,
        vectors: TokenVectors | None = None,
        prefix: Mapping[int, KeyValue] = NO_PREFIX,
        logit_bias: LogitBias = 0.0,
        shared: int = 0,
    ) -> Context:
        """Return the float32 context of token slots (N, L): (N, L, D), or (layers, N, L, D) with vectors for layers.

        Args:
            vectors: the learned vectors; see `embed`. Their residuals enter the values only.
            prefix, logit_bias: as for `CLIPTextTransformer.forward`.
            shared: no slot of the first `shared` tokens has a learned vector; they are computed once for all layers.
        """
        text, dtype = self.transformer.text_model, self.token_table.dtype
        inputs = self.embed(slots, None if vectors is None else vectors.e)
        worth_it = self.share_rows_from is not None and shared * self.width >= self.share_rows_from
        if worth_it and len(inputs) > 1 and not prefix:
            hidden = text.forward_shared(inputs, shared)
        else:
            hidden = text(inputs.flatten(0, 1), prefix, logit_bias).unflatten(0, inputs.shape[:2])
        context = Context.of(leave(text.final_layer_norm(hidden), dtype))
        if vectors is not None and vectors.residual is not None:
            residual = torch.where((slots < 0).unsqueeze(-1), at_slots(vectors.residual, slots), 0.0).to(hidden.dtype)
            hidden = hidden + hidden.norm(dim=-1, keepdim=True) * residual
            context = Context(context.k, leave(text.final_layer_norm(hidden), dtype))
        return context.map(lambda x: x.squeeze(0))

    @torch.no_grad()
    def read_below(self, slots: Tensor, layer: int) -> Tensor:
        """Return what text layer `layer` reads (N, L, D) of token ids (N, L): nothing below it depends on a prefix."""
        text = self.transformer.text_model
        return text.run_layers(text.enter(nn.functional.embedding(slots, self.token_table)), 0, layer)

    def encode_above(
        self, hidden: Tensor, layer: int, prefix: Mapping[int, KeyValue], logit_bias: LogitBias
    ) -> Context:
        """Return the context that `encode` returns, for what `read_below` returned."""
        text = self.transformer.text_model
        hidden = text.run_layers(hidden, layer, len(text.encoder.layers), prefix, logit_bias)
        return Context.of(leave(text.final_layer_norm(hidden), self.token_table.dtype))

    def forward(self, slots: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return contexts (N, L, D), float32, of slots (N, L) with `vectors` (R, D) in the learned places."""
        return self.encode(slots, None if vectors is None else TokenVectors(vectors[None, None])).k


def at_slots(table: Tensor, slots: Tensor) -> Tensor:
    """Return (layers, N, L, D): the rows of a table (layers, 1 or N, R, D) that slots (N, L) name, elsewhere any."""
    rows = (-1 - slots).clamp(min=0)
    if table.shape[1] == 1:
        return torch.stack([nn.functional.embedding(rows, layer) for layer in table[:, 0]])
    each = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
    return table[:, each, rows]


def open_tokenizer(folder: Path, tokens: int) -> CLIPTokenizer:
    """Open CLIP's BPE from its files, for a token table of so many rows.

    Raises:
        OSError: a file is missing, damaged or of another vocabulary: prompts would be other tokens.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer("a")
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    except Exception as error:  # a malformed file can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"The tokenizer in '{folder}' cannot be read ({reason}); copy its files again.") from error
    # without its files, transformers 5 makes a tokenizer of two tokens instead of failing
    found = max(tokenizer.get_vocab().values()) + 1, tokenizer.bos_token, tokenizer.eos_token
    if found != (tokens, *END_MARKS):
        wanted = f"CLIP vocabulary (vocab.json, merges.txt) of {tokens} tokens with the marks {' and '.join(END_MARKS)}"
        raise OSError(f"There is no {wanted} in '{folder}'.")
    made = {"".join(pair) for pair in bpe["merges"]} | set(tokenizer.all_special_tokens)
    unmade = [token for token in bpe["vocab"] if token not in made and len(token.removesuffix("</w>")) > 1]
    if unmade:
        lacks = f"merges.txt lacks what makes {len(unmade)} tokens of vocab.json, such as '{unmade[0]}'"
        raise OSError(f"In '{folder}', {lacks}; copy both files again, from one place.")
    return tokenizer


def hub_folder(repository: str) -> Path:
    """Return the folder of the hub's cache with a CLIP vocabulary, fetched if it is not there yet (else `OSError`)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    for local in (True, False):
        with suppress(OSError, ValueError, HfHubHTTPError):
            folder = Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=local))
            if all((folder / name).is_file() for name in FILES[:2]):
                return folder
    raise OSError(
        f"The tokenizer of '{repository}' is neither on this machine nor can it be fetched; put vocab.json and "
        "merges.txt into a folder and name it in model.params.cond_stage_config.params.tokenizer."
    )
