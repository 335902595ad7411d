"""The concepts behind the placeholders of a model: one that is learned, and those that are loaded.

Shapes: S stages, D width of the text transformer, R rows of the table of all learned vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.learned import Learned, LearnedPrefix, LearnedTokens
from ldm.embeddings import Concept, load_concept, refuse_other_width, save_concept
from ldm.files.base_model import describe_base, refuse_other_base, same_base
from ldm.methods import find_method
from ldm.methods.base import LearnedModule, Start, StepChange
from ldm.methods.prospect import GeneratorBlock, ProSpect
from ldm.methods.table import Table, learn_table
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.request import check_placeholder

logger = logging.getLogger(__name__)


class EmbeddingManager(nn.Module):
    """The concepts behind the placeholders: one that is being learned, and those loaded from files.

    Args:
        embedder: gives the initial word's embedding; not kept.
        placeholder_strings: placeholders of the concept that is learned; all of them mean the same vectors.
        initializer_words: word or words whose token embeddings, averaged, the learning starts from. None: nothing
            is learned here, concepts are loaded.
        num_stages: S. 1 is Textual Inversion.
        num_layers: cross-attention layers of the U-Net.
        generator: `block` (the reference's transformer block) or `table` (free vectors), where no method is named.
        method: a name in `ldm.methods.METHODS`, or a class of another package.
        method_params: the method's own parameters.
        dropout: `block` only.
        norm: `free` (the reference), or `word`: every vector keeps the length of the initial embedding.
    """

    ignored_keys = {
        "num_vectors_per_token": "the number of stages is model.params.prospect_stages",
        "per_image_tokens": "one placeholder is learned from all images",
        "progressive_words": "the reference's code for it does nothing",
        "progressive_counter": "the reference's code for it does nothing",
    }
    initial_embeddings: Tensor

    def __init__(
        self,
        embedder: FrozenCLIPEmbedder,
        placeholder_strings: Sequence[str] | str = ("*",),
        initializer_words: Sequence[str] | str | None = None,
        num_stages: int = 10,
        num_layers: int = 1,
        generator: str = "block",
        method: str | None = None,
        method_params: Mapping[str, Any] | None = None,
        dropout: float = 0.1,
        norm: str = "free",
    ) -> None:
        super().__init__()
        for name, value, known in (("generator", generator, ("block", "table")), ("norm", norm, ("free", "word"))):
            if value not in known:
                raise ValueError(f"{name} must be '{known[0]}' or '{known[1]}', not '{value}'.")
        self.placeholder_strings = (
            [placeholder_strings] if isinstance(placeholder_strings, str) else list(placeholder_strings)
        )
        for placeholder in self.placeholder_strings or [""]:
            check_placeholder(placeholder)
        words = [initializer_words] if isinstance(initializer_words, str) else list(initializer_words or [])
        self.initial_word = " ".join(words)
        self.num_stages, self.num_layers = num_stages, num_layers
        self.width = embedder.width
        text = embedder.transformer.config
        self._room = embedder.max_length - 2  # between the marks of a prompt
        self._text = text.num_hidden_layers, text.num_attention_heads
        self.loaded: dict[str, Concept] = {}
        self._modules_loaded: dict[str, LearnedTokens | LearnedPrefix] = {}
        self.base_model: Mapping[str, str] = {}  # the name and the fingerprint of the base model, if it is known
        self.learned: LearnedModule | None = None
        self.register_buffer("initial_embeddings", torch.zeros(1, self.width))
        if not words:
            return
        word, count = initial_embedding(embedder, self.initial_word)
        self.initial_embeddings.copy_(word)
        start = Start(self.initial_embeddings, count, num_stages, num_layers, *self._text)  # who sets it, sets both
        if method is not None:
            given = {"generator": generator != "block", "dropout": dropout != 0.1, "norm": norm != "free"}
            if idle := [name for name, is_given in given.items() if is_given]:
                raise ValueError(f"{idle[0]} has no effect with the method '{method}', whose own are in method_params.")
            self.learned = find_method(method).learn(start, **(method_params or {}))
        elif generator == "block":
            self.learned = ProSpect(start, dropout, norm)
        else:
            self.learned = learn_table(start, norm=word.norm() if norm == "word" else None)

    @property
    def attention(self) -> GeneratorBlock | None:
        """The reference's name of the generator block."""
        return self.learned if isinstance(self.learned, GeneratorBlock) else None

    def embeddings(self) -> Tensor:
        """Return the S vectors of the learned (or, for the first placeholder, loaded) concept: float32 (S, D).

        Raises:
            ValueError: nothing is learned and nothing is loaded, or its method has no stage vectors.
        """
        if self.placeholder_strings[0] in self.loaded:
            return self.loaded[self.placeholder_strings[0]].vectors.to(self.initial_embeddings.device)
        return self._stage_vectors()

    def _stage_vectors(self) -> Tensor:
        """Return the S vectors that are being learned."""
        if isinstance(self.learned, ProSpect):
            return self.learned.values()
        if isinstance(self.learned, Table) and self.learned.num_layers == self.learned.num_tokens == 1:
            return self.learned.values()[:, 0, 0]
        raise ValueError("No stage vectors are learned or loaded; call embedding_manager.load(path) first.")

    def _concepts(self) -> dict[str, Any]:
        """Return placeholder -> what prompts read of its concept, the learned one first; several may share one."""
        trained = [] if self.learned is None else [p for p in self.placeholder_strings if p not in self.loaded]
        return dict.fromkeys(trained, self.learned) | self._modules_loaded

    def rows(self) -> dict[str, list[list[int]]]:
        """Return placeholder -> for each of the S stages, the rows of the table of all vectors that stand there.

        A concept with another number of stages is read by time: stage s takes the concept's stage at the middle
        of s.
        """
        rows: dict[str, list[list[int]]] = {}
        starts: dict[int, int] = {}
        end = 0
        for placeholder, tokens in self._concepts().items():
            if is_prefix(tokens):
                continue
            if id(tokens) not in starts:
                starts[id(tokens)], end = end, end + tokens.num_rows
            first = starts[id(tokens)]
            stages = range(self.num_stages)
            rows[placeholder] = [[first + row for row in tokens.rows_at(s, self.num_stages)] for s in stages]
        return rows

    def learned_now(self, truncation: int | None = None) -> Learned:
        """Return what prompts read at this moment; concepts that are loaded later do not change it."""
        concepts = list({id(module): module for module in self._concepts().values()}.values())
        for module in concepts:
            module.to(self.initial_embeddings.device)
        tokens = tuple(module for module in concepts if not is_prefix(module))
        return Learned(tokens, tuple(module for module in concepts if is_prefix(module)), truncation)

    def vectors(self) -> Tensor | None:
        """Return the table of all vectors (R, D) where none changes with time or layer; None when there are none."""
        table = self.learned_now().vectors(torch.zeros(1, dtype=torch.long, device=self.initial_embeddings.device))
        return None if table is None else table.e[0, 0]

    def _module_of(self, concept: Concept) -> LearnedTokens | LearnedPrefix:
        """Return what prompts read of a concept.

        Raises:
            ValueError: it was learned for another U-Net or text transformer, or stands at no placeholder.
        """
        module = find_method(concept.method).load(concept.tensors, concept.metadata)
        what = f"This concept ({concept.method})"
        if isinstance(module, StepChange):
            raise ValueError(f"{what} inverts one image and stands at no placeholder; edit it (scripts/edit.py).")
        layers, width = getattr(module, "num_layers", 1), getattr(module, "width", self.width)
        if layers not in (1, self.num_layers) or width != self.width:
            raise ValueError(
                f"{what} is for {layers} cross-attention layers and has width {width}, but this model's text encoder "
                f"has {self.width}, and its U-Net {self.num_layers} layers: it was learned for another base model."
            )
        if (tokens := getattr(module, "num_tokens", 1)) > self._room:
            raise ValueError(
                f"{what} has {tokens} tokens, and a prompt of this model has room for {self._room}; if they are "
                "stages: scripts/import_embedding.py --rows_are_stages."
            )
        if hasattr(module, "check_fits"):
            module.check_fits(*self._text)
        return module

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
            refuse_other_width(concept, placeholder, self.width, self.base_model.get("base_model", "unknown"))
            if not any_base:
                what = f"The embedding for '{placeholder}'{f' ({concept.source})' if concept.source else ''}"
                refuse_other_base(concept.metadata, self.base_model, what)
        modules = {placeholder: self._module_of(concept) for placeholder, concept in concepts.items()}
        self.loaded.update(concepts)
        self._modules_loaded.update(modules)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Forget at the end of the context what is loaded inside."""
        kept = self.loaded.copy(), self._modules_loaded.copy()
        try:
            yield
        finally:
            self.loaded, self._modules_loaded = kept

    def unload(self, *placeholders: str) -> None:
        """Remove concepts that were loaded; without a placeholder, all of them."""
        for placeholder in placeholders or tuple(self.loaded):
            if placeholder not in self.loaded:
                raise ValueError(f"No concept is loaded for '{placeholder}'; loaded: {', '.join(self.loaded)}.")
            del self.loaded[placeholder], self._modules_loaded[placeholder]

    def start_from(self, source: str | Path | Concept) -> None:
        """Continue learning where a saved concept ended: without dropout, its vectors are then the learned ones.

        With `norm='word'` their directions are.

        Raises:
            ValueError: the file cannot be used, or has other stages or another width than this model.
        """
        concept = source if isinstance(source, Concept) else load_concept(source, self.placeholder_strings[0])
        if same_base(concept.metadata, self.base_model) is False:
            theirs, ours = describe_base(concept.metadata), describe_base(self.base_model)
            logger.warning("The embedding to start from was learned for the base model %s, not for %s.", theirs, ours)
        if self.learned is None:
            raise ValueError("Nothing is learned here, so nothing can start from a concept; give initializer_words.")
        try:
            find_method(self.learned.method).check(concept.tensors)
            self.learned.start_from(concept.tensors, concept.metadata)
        except ValueError as error:
            raise ValueError(f"The embedding to start from cannot be used: {error}") from error

    def save(self, path: str | Path, **metadata: str) -> None:
        """Write what is learned (or loaded for the first placeholder), without dropout, as a concept file."""
        own = {"init_word": self.initial_word}
        if self.learned is None:
            concept = Concept(self.embeddings().detach().cpu(), {**own, **metadata})
        else:
            tensors, described = self.learned.to_concept()
            tensors = {name: x.detach().cpu() for name, x in tensors.items()}
            concept = Concept(tensors, {**own, **described, **metadata}, self.learned.method)
        save_concept(concept, path, self.placeholder_strings[0])

    def distance_to_initial(self) -> Tensor:
        """Return Textual Inversion's regulariser: the squared distance to the initial word, mean over stages."""
        return (self._stage_vectors() - self.initial_embeddings).pow(2).sum(dim=1).mean()

    def embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


def is_prefix(module: object) -> bool:
    """Return whether a method changes the text transformer's attention instead of standing at a placeholder."""
    return hasattr(module, "key_values")


@torch.no_grad()
def initial_embedding(embedder: FrozenCLIPEmbedder, words: str) -> tuple[Tensor, int]:
    """Return the mean (1, D) float32 of the token embeddings of `words`, and how many tokens these are.

    Raises:
        ValueError: no token is left of the words.
    """
    ids = embedder.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The initial word '{words}' has no token; give an ordinary word, such as 'teddy'.")
    table = embedder.token_table
    return table[torch.tensor(ids, device=table.device)].float().mean(dim=0, keepdim=True), len(ids)
