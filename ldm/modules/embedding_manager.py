"""The learned tokens: S vectors for a placeholder, one for each stage of denoising (ProSpect, section 4).

Shapes: S stages, D width of the text transformer, R rows of the table of all learned vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.learned import NOTHING_LEARNED, FixedVectors, Learned
from ldm.conditioning.prompts import check_placeholder
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.files.base_model import refuse_other_base
from ldm.methods.prospect import GeneratorBlock

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder


class EmbeddingManager(nn.Module):
    """What stands behind the placeholders: a concept that is being learned, and concepts loaded from files.

    Args:
        embedder: gives the initial word's embedding; not kept.
        placeholder_strings: placeholders of the concept that is learned; all of them mean the same vectors.
        initializer_words: word or words whose token embeddings, averaged, the learning starts from. None: nothing
            is learned here, concepts are loaded.
        num_stages: S. 1 is Textual Inversion.
        generator: `block` (the reference's transformer block) or `table` (S free vectors).
        initial_spread: `table` only: standard deviation of what tells the stages apart at the start, relative to
            the initial embedding's own.
        norm: `free` (the reference), or `word`: every vector keeps the length of the initial embedding.
    """

    ignored_keys = {
        "num_vectors_per_token": "the number of stages is model.params.prospect_stages",
        "per_image_tokens": "one placeholder is learned from all pictures",
        "progressive_words": "the reference's code for it does nothing",
        "progressive_counter": "the reference's code for it does nothing",
    }

    def __init__(
        self,
        embedder: FrozenCLIPEmbedder,
        placeholder_strings: Sequence[str] | str = ("*",),
        initializer_words: Sequence[str] | str | None = None,
        num_stages: int = 10,
        generator: str = "block",
        dropout: float = 0.1,
        initial_spread: float = 1.0,
        norm: str = "free",
    ) -> None:
        super().__init__()
        if num_stages < 1:
            raise ValueError(f"The number of stages must be at least 1, not {num_stages}.")
        if generator not in ("block", "table"):
            raise ValueError(f"generator must be 'block' or 'table', not '{generator}'.")
        if norm not in ("free", "word"):
            raise ValueError(f"norm must be 'free' or 'word', not '{norm}'.")
        self.norm = norm
        self.placeholder_strings = (
            [placeholder_strings] if isinstance(placeholder_strings, str) else list(placeholder_strings)
        )
        for placeholder in self.placeholder_strings or [""]:
            check_placeholder(placeholder)
        words = [initializer_words] if isinstance(initializer_words, str) else list(initializer_words or [])
        self.initial_word = " ".join(words)
        self.num_stages = num_stages
        self.width = embedder.width
        self.learning = bool(words)
        self.loaded: dict[str, Concept] = {}
        self.base_model: Mapping[str, str] = {}  # the name and the fingerprint of the base model, if it is known
        self.attention: GeneratorBlock | None = None
        self.table: nn.Parameter | None = None
        self.register_buffer("initial_embeddings", torch.zeros(1, self.width))
        if not self.learning:
            return
        self.initial_embeddings.copy_(initial_embedding(embedder, self.initial_word))
        if generator == "block":
            self.attention = GeneratorBlock(self.width, num_stages, dropout=dropout)
        else:
            noise = torch.randn(num_stages, self.width) * self.initial_embeddings.std()
            spread = initial_spread if num_stages > 1 else 0.0
            self.table = nn.Parameter(self.initial_embeddings + spread * noise)

    def embeddings(self) -> Tensor:
        """The S vectors of the learned (or, for the first placeholder, loaded) concept: float32 (S, D).

        Raises:
            ValueError: nothing is learned and nothing is loaded.
        """
        if self.placeholder_strings[0] in self.loaded:
            return self.loaded[self.placeholder_strings[0]].vectors.to(self.initial_embeddings.device)
        if not self.learning:
            raise ValueError("No embedding is learned or loaded; call embedding_manager.load(path) first.")
        return self._learned()

    def _learned(self) -> Tensor:
        vectors = self._generated()
        if self.norm == "word":
            vectors = F.normalize(vectors, dim=-1) * self.initial_embeddings.norm()
        return vectors

    def _generated(self) -> Tensor:
        return self.attention(self.initial_embeddings) if self.attention is not None else self.table

    def rows(self) -> dict[str, list[int]]:
        """Placeholder -> its row in `vectors()` for each of the S stages.

        A concept with another number of stages is read by time: stage s takes the concept's stage at the middle
        of s.
        """
        rows: dict[str, list[int]] = {}
        start = 0
        if self._trained_placeholders():
            rows.update(dict.fromkeys(self._trained_placeholders(), list(range(self.num_stages))))
            start = self.num_stages
        for placeholder, concept in self.loaded.items():
            rows[placeholder] = [start + row for row in concept.rows_for(self.num_stages)]
            start += concept.num_stages
        return rows

    def vectors(self) -> Tensor | None:
        """All learned vectors (R, D), in the order of `rows()`; None when there are none."""
        parts = [self._learned()] if self._trained_placeholders() else []
        parts += [concept.vectors.to(self.initial_embeddings.device) for concept in self.loaded.values()]
        return torch.cat(parts) if parts else None

    def learned_now(self) -> Learned:
        """Return what prompts read at this moment; concepts that are loaded later do not change it."""
        vectors = self.vectors()
        return NOTHING_LEARNED if vectors is None else Learned((FixedVectors(vectors[None]),))

    def _trained_placeholders(self) -> list[str]:
        return [p for p in self.placeholder_strings if self.learning and p not in self.loaded]

    def load(self, source: str | Path | Concept | Mapping[str, Any], any_base: bool = False) -> None:
        """Take concepts from files; see `load_concept` for what can be read.

        Args:
            source: a file for the first placeholder, or {placeholder: file}. Replaces what was loaded for it.
            any_base: also concepts that were learned for another base model (of the same width).

        Raises:
            ValueError: a placeholder or a file cannot be used, or it was learned for another width or base model.
        """
        sources = source if isinstance(source, Mapping) else {self.placeholder_strings[0]: source}
        for placeholder in sources:
            check_placeholder(placeholder)
        concepts = {p: s if isinstance(s, Concept) else load_concept(s, p) for p, s in sources.items()}
        for placeholder, concept in concepts.items():
            what = f"The embedding for '{placeholder}'{f' ({concept.source})' if concept.source else ''}"
            if concept.width != self.width:
                theirs = concept.metadata.get("base_model", "unknown")
                ours = self.base_model.get("base_model", "unknown")
                raise ValueError(
                    f"{what} has width {concept.width} (base model: {theirs}), but this model's text encoder has width "
                    f"{self.width} (base model: {ours}): it was learned for another base model."
                )
            if not any_base:
                refuse_other_base(concept.metadata, self.base_model, what)
        self.loaded.update(concepts)

    @torch.no_grad()
    def start_from(self, source: str | Path | Concept) -> None:
        """Begin learning where a saved concept ended: without dropout, its vectors are then the learned ones.

        With `norm='word'` their directions are.

        Raises:
            ValueError: the file cannot be used, or has other stages or another width than this model.
        """
        concept = source if isinstance(source, Concept) else load_concept(source, self.placeholder_strings[0])
        if tuple(concept.vectors.shape) != (self.num_stages, self.width):
            raise ValueError(
                f"The embedding to start from has {concept.num_stages} stages of width {concept.width}; this run "
                f"learns {self.num_stages} of width {self.width}."
            )
        was_training = self.training
        self.eval()
        difference = concept.vectors.to(self.initial_embeddings.device) - self._generated()
        if self.attention is not None:
            self.attention.ff.net[2].bias.add_(difference.flatten())
        else:
            self.table.add_(difference)
        self.train(was_training)

    def save(self, path: str | Path, **metadata: str) -> None:
        """Write the S vectors, without dropout, as an embedding file."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            vectors = (self._learned() if self.learning else self.embeddings()).detach().float().cpu()
        self.train(was_training)
        concept = Concept(vectors, {"init_word": self.initial_word, **metadata})
        save_concept(concept, path, self.placeholder_strings[0])

    def distance_to_initial(self) -> Tensor:
        """Squared distance to the initial word's embedding, mean over stages: Textual Inversion's regulariser."""
        return (self._learned() - self.initial_embeddings).pow(2).sum(dim=1).mean()

    def embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


@torch.no_grad()
def initial_embedding(embedder: FrozenCLIPEmbedder, words: str) -> Tensor:
    """Mean (1, D) float32 of the token embeddings of `words`.

    Raises:
        ValueError: no token is left of the words.
    """
    ids = embedder.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The initial word '{words}' has no token; give an ordinary word, such as 'teddy'.")
    return embedder.token_table[torch.tensor(ids, device=embedder.token_table.device)].float().mean(dim=0, keepdim=True)
