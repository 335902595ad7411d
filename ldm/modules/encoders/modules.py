"""The prompt encoder of Stable Diffusion v1: CLIP's tokenizer and text transformer."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.conditioning.learned import TokenVectors
from ldm.config import nearest
from ldm.modules.diffusionmodules.util import enter, leave
from ldm.modules.encoders.clip import NO_PREFIX, CLIPTextConfig, CLIPTextModel, KeyValue

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

KNOWN_VERSIONS = {"openai/clip-vit-large-patch14": CLIPTextConfig()}


class FrozenCLIPEmbedder(nn.Module):
    """Token ids and learned vectors to contexts; parameters as in the reference's `cond_stage_config`.

    Args:
        version: name of a known text transformer; with `text_config` any name is accepted.
        max_length: L, the tokens of a prompt with its two end marks.
        text_config: sizes, as the fields of `CLIPTextConfig`.
        tokenizer: folder with `vocab.json` and `merges.txt`; None takes `version` from the hub's cache.

    Raises:
        ValueError: an unknown version without `text_config`, or more tokens than the transformer has positions.
    """

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
        """CLIP's BPE, opened at the first use; no network is used when the files are on this machine.

        Raises:
            OSError: the vocabulary is neither in the folder nor in the hub's cache, nor can it be fetched.
        """
        from transformers import CLIPTokenizer

        folder = Path(self.tokenizer_folder) if self.tokenizer_folder is not None else hub_folder(self.version)
        tokens = self.transformer.config.vocab_size
        if folder is not None:
            # without its files, transformers 5 returns a tokenizer of two tokens instead of failing
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else None
            if tokenizer is not None and max(tokenizer.get_vocab().values()) + 1 == tokens:
                return tokenizer
            raise OSError(f"There is no CLIP vocabulary (vocab.json, merges.txt) of {tokens} tokens in '{folder}'.")
        raise OSError(
            f"The tokenizer of '{self.version}' is neither on this machine nor can it be fetched; put vocab.json and "
            "merges.txt into a folder and name it in model.params.cond_stage_config.params.tokenizer."
        )

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
        logit_bias: float = 0.0,
    ) -> Context:
        """Return the float32 context of token slots (N, L): (N, L, D), or (layers, N, L, D) with vectors for layers.

        Args:
            vectors: the learned vectors; see `embed`. Their residuals enter the values only.
            prefix, logit_bias: as for `CLIPTextTransformer.forward`.
        """
        text, dtype = self.transformer.text_model, self.token_table.dtype
        inputs = self.embed(slots, None if vectors is None else vectors.e)
        hidden = text(inputs.flatten(0, 1), prefix, logit_bias).unflatten(0, inputs.shape[:2])
        context = Context.of(leave(text.final_layer_norm(hidden), dtype))
        if vectors is not None and vectors.residual is not None:
            residual = torch.where((slots < 0).unsqueeze(-1), at_slots(vectors.residual, slots), 0.0).to(hidden.dtype)
            hidden = hidden + hidden.norm(dim=-1, keepdim=True) * residual
            context = Context(context.k, leave(text.final_layer_norm(hidden), dtype))
        return context.map(lambda x: x.squeeze(0))

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


def hub_folder(repository: str) -> Path | None:
    """The folder of the hub's cache with a CLIP vocabulary, fetched if it is not there yet; None if that fails."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    files = [try_to_load_from_cache(repository, name) for name in names]  # asks nobody
    if not all(isinstance(file, str) for file in files):
        if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
            return None  # the hub's client would try again for half a minute
        try:
            files = [hf_hub_download(repository, name) for name in names]
        except (OSError, ValueError, HfHubHTTPError):
            return None
    return Path(files[0]).parent


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether the server of a web address answers; with a proxy, which only a request could tell, True."""
    if getproxies():
        return True
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=seconds):
            return True
    except OSError:
        return False
