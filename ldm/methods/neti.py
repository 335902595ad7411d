"""NeTI: a small network from timestep and U-Net layer to a token embedding (Alaluf et al. 2023, "A Neural Space-Time
Representation for Text-to-Image Personalization").

Shapes: B timesteps, layers of cross-attention in order of execution, D width of the text transformer, H = 128.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.learned import TokenVectors
from ldm.methods.base import LearnedModule, Metadata, Start, Tensors
from ldm.request import read_number
from ldm.util import usual_torch

HIDDEN = 128
FREQUENCIES = 1024  # of the Fourier features, each a sine and a cosine
BYPASS_STRENGTH = 0.2  # of the textual bypass, in units of the hidden state's norm
NORMS = ("joint", "token")
SETTINGS = "neti.settings"  # in a concept's metadata

# Least and greatest value of each number.
_SIZES = {"num_layers": (1, 1000), "width": (1, 1 << 16), "num_anchors": (1, 1000), "target_norm": (0, 1e6)}
_SIZES |= {"sigma_t": (0, 1e6), "sigma_l": (0, 1e6), "nested_dropout": (0, 1)}


@dataclass(frozen=True)
class NeTISettings:
    """Settings of a mapper; the defaults are the published ones.

    Args:
        num_layers: cross-attention layers of the U-Net.
        target_norm: norm of the output, that of the super-category's embedding; None leaves it free.
        normalize: what has `target_norm`: `joint`, token embedding and bypass together, as released files have it, or
            the `token` embedding alone, as the paper says.
        output_bypass: also a residual for the values (the textual bypass).
        positional_encoding: Fourier features; without them t and layer enter as numbers in [-1, 1].
        sigma_t, sigma_l: deviations of the frequencies for raw timesteps and layers.
        num_anchors: timesteps on which the first layer's rows are centred at the start; divides 1000.
        nested_dropout: probability that a call drops the tail of the hidden vector, in training; None: never, and
            truncation is ignored.

    Raises:
        ValueError: a number of anchors that does not divide 1000, an unknown norm, or a value of a wrong type or size.
    """

    num_layers: int = 16
    width: int = 768
    target_norm: float | None = None
    normalize: str = "joint"
    output_bypass: bool = True
    positional_encoding: bool = True
    sigma_t: float = 0.03
    sigma_l: float = 2.0
    num_anchors: int = 10
    nested_dropout: float | None = 0.5

    def __post_init__(self) -> None:
        for name, (low, high) in _SIZES.items():
            if getattr(self, name) is not None or name not in ("target_norm", "nested_dropout"):
                read_number(name, getattr(self, name), low, high, whole=isinstance(getattr(NeTISettings, name), int))
        if 1000 % self.num_anchors:
            raise ValueError(f"num_anchors must divide 1000, not {self.num_anchors}; 10 is usual.")
        if self.normalize not in NORMS:
            raise ValueError(f"normalize must be one of {', '.join(NORMS)}, not '{self.normalize}'.")


class NeTIMapper(LearnedModule):
    """The mapper M(t, l); parameter names are those of the released `mapper-*.pt` files."""

    method = "neti"
    num_rows = 1
    w: Tensor

    def __init__(self, settings: NeTISettings) -> None:
        super().__init__()
        self.settings = settings
        self.num_layers, self.width = settings.num_layers, settings.width
        self.truncates = settings.nested_dropout is not None
        anchors = settings.num_anchors * settings.num_layers
        self.input_layer: nn.Module = nn.Identity()
        if settings.positional_encoding:
            scale = torch.tensor([settings.sigma_t, settings.sigma_l])
            self.register_buffer("w", torch.randn(FREQUENCIES, 2) * scale)
            self.input_layer = nn.Linear(2 * FREQUENCIES, anchors)
            self._centre_anchors(self.input_layer)
        self.net = nn.Sequential(
            self.input_layer,
            nn.Linear(anchors if settings.positional_encoding else 2, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.LeakyReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.LeakyReLU(),
        )
        self.output_layer = nn.Sequential(nn.Linear(HIDDEN, settings.width * (1 + settings.output_bypass)))

    @torch.no_grad()
    def _centre_anchors(self, layer: nn.Linear) -> None:
        """Row a · layers + l becomes the features of timestep 1000 · a / anchors and layer l."""
        t = torch.arange(self.settings.num_anchors) * (1000 // self.settings.num_anchors)
        layers = torch.arange(self.num_layers)
        layer.weight.copy_(self.features(t.repeat_interleave(self.num_layers), layers.repeat(len(t))))

    def features(self, t: Tensor, layer: Tensor) -> Tensor:
        """Return Fourier features of norm 1, float32 (N, 2048), of raw timesteps and layers (N,) each."""
        phase = torch.stack([t, layer], dim=-1).float() @ self.w.T
        return torch.cat([phase.sin(), phase.cos()], dim=-1) / FREQUENCIES**0.5

    def encode(self, t: Tensor, layer: Tensor) -> Tensor:
        """Return what the network reads: features (N, 2048), or numbers (N, 2)."""
        if self.settings.positional_encoding:
            return self.features(t, layer)
        return torch.stack([2 * t.float() / 999 - 1, 2 * layer.float() / (self.num_layers - 1) - 1], dim=-1)

    def forward(self, t: Tensor, layer: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the normalised output (N, D), or (N, 2·D) with a bypass, for timesteps and layers (N,).

        Args:
            kept: how many hidden values each row keeps (N,); None keeps all.
        """
        hidden = self.net(self.encode(t, layer))
        if kept is not None:
            hidden = hidden * (torch.arange(HIDDEN, device=hidden.device) < kept.unsqueeze(-1))
        return self._normalised(self.output_layer(hidden))

    def _normalised(self, y: Tensor) -> Tensor:
        norm = self.settings.target_norm
        if norm is None:
            return y
        if self.settings.normalize == "joint":
            return norm * F.normalize(y, dim=-1)
        e, rest = y[..., : self.width], y[..., self.width :]
        return torch.cat([norm * F.normalize(e, dim=-1), rest], dim=-1)

    def draw_kept(self, batch: int) -> Tensor:
        """Draw how many hidden values nested dropout keeps, (layers, batch), from PyTorch's global state on the CPU.

        For each layer's call one draw says whether it drops anything; then each sample draws its own number.
        """
        fires = torch.rand(self.num_layers, 1) < (self.settings.nested_dropout or 0.0)
        return torch.where(fires, torch.randint(0, HIDDEN, (self.num_layers, batch)), HIDDEN)

    def rows_at(self, stage: int, num_stages: int) -> list[int]:
        return [0]

    def bucket(self, t: int) -> int:
        return t

    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {name: x.detach() for name, x in self.state_dict().items() if not name.startswith("net.0.")}
        return tensors, {SETTINGS: json.dumps(asdict(self.settings))}

    @torch.no_grad()
    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        mapper = load_mapper(tensors, metadata)
        if mapper.settings != replace(self.settings, target_norm=mapper.settings.target_norm):
            raise ValueError(f"its mapper has other settings ({mapper.settings}); this run's are {self.settings}.")
        self.load_state_dict(mapper.state_dict())

    def vectors(self, t: Tensor, truncation: int | None = None) -> TokenVectors:
        """Return e (layers, B, 1, D), and the residual for the values with a bypass, at timesteps t (B,).

        Args:
            truncation: hidden values that are kept, as a Python slice `[:truncation]`; None keeps all. Small values are
                easier to edit, large ones closer to the images.
        """
        batch = len(t)
        layer = torch.arange(self.num_layers, device=t.device).repeat_interleave(batch)
        kept: Tensor | None = None
        if self.training and self.settings.nested_dropout:
            kept = self.draw_kept(batch).flatten().to(t.device)
        elif truncation is not None and self.truncates:
            kept = torch.full_like(layer, len(range(HIDDEN)[:truncation]))
        y = self(t.repeat(self.num_layers), layer, kept).view(self.num_layers, batch, 1, -1)
        e, r = y[..., : self.width], y[..., self.width :]
        return TokenVectors(e, BYPASS_STRENGTH * F.normalize(r, dim=-1) if self.settings.output_bypass else None)


def learn_mapper(start: Start, normalize: str | None = "joint", **settings: Any) -> NeTIMapper:
    """Return a mapper whose output has the norm of the initial word, the super-category.

    Args:
        normalize: `joint`, `token`, or None for no norm.
        settings: further fields of `NeTISettings`.

    Raises:
        ValueError: a super-category of several tokens.
    """
    if start.num_word_tokens != 1:
        raise ValueError(f"NeTI's super-category must be a word of one token, not of {start.num_word_tokens}.")
    width, norm = start.word.shape[-1], None if normalize is None else float(start.word.norm())
    norms = {"target_norm": norm, "normalize": normalize or "joint"}
    return NeTIMapper(NeTISettings(start.num_layers, width, **norms, **settings))  # type: ignore[arg-type]


def check_mapper(tensors: Tensors) -> None:
    """Raise `ValueError` unless a concept holds a mapper's weights."""
    if "output_layer.0.weight" not in tensors or "net.1.weight" not in tensors:
        raise ValueError(f"its tensors ({', '.join(list(tensors)[:4])}) are no NeTI mapper.")


def from_reference(parameters: Tensors, encoding: Tensors, config: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a concept for what the reference saves; its norm is of both halves.

    Args:
        parameters: the mapper's state dict; one that was saved after a warm start has the frequencies, too.
        encoding: tensors of its positional encoding.
        config: of its run, nested dicts.

    Raises:
        ValueError: the configuration is incomplete or does not fit the tensors.
    """
    try:
        model, output = config["model"], parameters["output_layer.0.weight"]
        positional, bypass = bool(model["use_positional_encoding"]), bool(model["output_bypass"])
        if model["normalize_mapper_output"] and not model["target_norm"]:
            raise ValueError("it is normalised, but has no target_norm")
        anchors = int(model["num_pe_time_anchors"])
        settings = NeTISettings(
            num_layers=len(parameters["input_layer.weight"]) // anchors if positional else 16,
            width=len(output) // (1 + bypass),
            target_norm=float(model["target_norm"]) if model["target_norm"] else None,
            output_bypass=bypass,
            positional_encoding=positional,
            sigma_t=float(model["pe_sigmas"]["sigma_t"]),
            sigma_l=float(model["pe_sigmas"]["sigma_l"]),
            num_anchors=anchors,
            nested_dropout=float(model["nested_dropout_prob"]) if model["use_nested_dropout"] else None,
        )
        tensors = {name: x for name, x in parameters.items() if not name.startswith(("net.0.", "encoder."))}
        if positional:
            tensors["w"] = next(encoding[name] for name in ("w", "_parameters.w") if name in encoding)
        metadata = {
            SETTINGS: json.dumps(asdict(settings)),
            "placeholder": str(config["data"]["placeholder_token"]),
            "init_word": str(config["data"]["super_category_token"]),
        }
    except (KeyError, TypeError, ValueError, StopIteration, ZeroDivisionError) as error:
        reason = f"it is no mapper of NeTI that can be read ({type(error).__name__} {error})"
        raise ValueError(f"{reason}; use another copy of the file.") from error
    load_mapper(tensors, metadata)
    return tensors, metadata


@usual_torch()
def load_mapper(tensors: Tensors, metadata: Metadata) -> NeTIMapper:
    """Return the frozen mapper of a concept.

    Raises:
        ValueError: its settings are missing or do not fit the tensors.
    """
    try:
        values = json.loads(metadata[SETTINGS])
        if lacking := ", ".join(field.name for field in fields(NeTISettings) if field.name not in values):
            raise ValueError(f"its settings lack {lacking}")
        settings = NeTISettings(**values)
        mapper = NeTIMapper(settings)
        names = ("weight", "bias") if settings.positional_encoding else ()
        mapper.load_state_dict({**tensors, **{f"net.0.{name}": tensors[f"input_layer.{name}"] for name in names}})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"its mapper cannot be read ({reason}); use another copy of the file.") from error
    return mapper.eval().requires_grad_(False)
