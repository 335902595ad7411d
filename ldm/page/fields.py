"""Inputs made from the fields of `Request`: their types, choices and meanings are used as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from ldm.cli.flags import arguments_of
from ldm.page import parts
from ldm.page.form import Form
from ldm.request import CHOICES, RANGES, ModelFacts, Request

TYPED = [name for name, (_, high) in RANGES.items() if high > 1 << 53]  # seeds: a browser would round them
NAMES = {  # where the field's own name is not what a user would say
    "ddim_steps": "Steps",
    "ddim_eta": "Eta",
    "scale": "Guidance scale",
    "n_samples": "Images in a batch",
    "n_iter": "Batches",
    "n_rows": "Images in a row",
    "any_base": "Concepts of other base models",
    "legacy_word_tokens": "The reference's tokenisation",
}
_MEANINGS = arguments_of(Request)


def default_of(name: str, facts: ModelFacts) -> Any:
    """The value of a field that is not given: the request's, or the model's own."""
    default = Request.__dataclass_fields__[name].default
    return getattr(facts, name, None) if default is None else default


def name_of(name: str) -> str:
    return NAMES.get(name, name.replace("_", " ").capitalize())


def meaning_of(name: str) -> str:
    return " ".join(_MEANINGS.get(name, "").split())


class Fields:
    """Inputs for some fields of the form's settings.

    Args:
        changed: is called when the user has changed one.
    """

    def __init__(self, form: Form, facts: ModelFacts, changed: Callable[[], None]) -> None:
        self.form, self.facts, self.changed = form, facts, changed
        self.inputs: dict[str, Any] = {}
        self._quiet = False

    def add(self, name: str) -> None:
        """Add the input that fits a field."""
        if name in CHOICES:
            made = self._choice(name)
        elif name in RANGES and name not in TYPED:
            made = self._number(name)
        else:
            made = ui.input(name_of(name), value=self._shown(name))
        made.props(parts.LOOK).tooltip(meaning_of(name)).mark(name)
        made.on_value_change(lambda event: self._take(name, event.value))
        made.on("blur", self.refresh)  # what was left empty is the model's own
        self.inputs[name] = made

    def refresh(self) -> None:
        """Show what the form holds now."""
        self._quiet = True
        for name, made in self.inputs.items():
            made.value = self._shown(name)
            made.set_enabled(not (name == "scale" and self.form.scales is not None))
        self._quiet = False

    def value_of(self, name: str) -> Any:
        """What the form holds; None for guidance by stage, which the timeline shows."""
        value = self.form.settings.get(name, default_of(name, self.facts))
        return None if isinstance(value, tuple) else value

    def _shown(self, name: str) -> Any:
        value = self.value_of(name)
        return str(value) if name in TYPED else value

    def _choice(self, name: str) -> Any:
        known = CHOICES[name]
        if known == (False, True):
            return ui.checkbox(name_of(name), value=bool(self.value_of(name)))
        options = [choice for choice in known if choice]
        return ui.select(options, label=name_of(name), value=self.value_of(name), clearable=None in known)

    def _number(self, name: str) -> Any:
        whole = str(Request.__dataclass_fields__[name].type).startswith("int")
        _, high = RANGES[name]
        step = self.facts.size_unit if name in ("height", "width") else 1 if whole or high > 1 else 0.05
        # no limits: what is out of range is answered by the library's sentence
        return ui.number(name_of(name), value=self.value_of(name), step=step, min=None, max=None)

    def _take(self, name: str, value: Any) -> None:
        if self._quiet:
            return
        if name in TYPED or (isinstance(value, float) and value.is_integer()):
            value = _whole(value)
        own = Request.__dataclass_fields__[name].default  # None: left empty, it is the model's
        if value == default_of(name, self.facts) or (value is None and own is None):
            self.form.settings.pop(name, None)
        else:
            self.form.settings[name] = value
        self.changed()


def _whole(value: float | str) -> int | float | str:
    """A value as a whole number, if it is one; otherwise the library says what is wrong."""
    try:
        return int(value)
    except ValueError:
        return value
