"""Inputs made from the fields of `Request`: their types, choices and meanings are used as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from ldm.cli.flags import arguments_of
from ldm.page import parts
from ldm.page.form import as_number
from ldm.page.session import Session
from ldm.request import CHOICES, RANGES, Request

SPECS = Request.__dataclass_fields__
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


class Fields:
    """Inputs for some settings of the session's form.

    Args:
        changed: is called when the user has changed one.
    """

    def __init__(self, session: Session, changed: Callable[[], None]) -> None:
        self.session, self.facts, self._changed = session, session.engine.facts, changed
        self.inputs: dict[str, Any] = {}

    def add(self, name: str) -> None:
        """Add the input that fits a field."""
        label, value = NAMES.get(name, name.replace("_", " ").capitalize()), self._shown(name)
        if CHOICES.get(name) == (False, True):
            made: Any = ui.checkbox(label, value=value)
        elif name in CHOICES:
            options = [choice for choice in CHOICES[name] if choice]
            made = ui.select(options, label=label, value=value, clearable=None in CHOICES[name])
        elif name in RANGES and name not in TYPED:
            whole = str(SPECS[name].type).startswith("int") or RANGES[name][1] > 1
            step = self.facts.size_unit if name in ("height", "width") else 1 if whole else 0.05
            # no limits: what is out of range is answered by the library's sentence
            made = ui.number(label, value=value, step=step)
        else:
            made = ui.input(label, value=value)
        made.props(parts.LOOK).tooltip(" ".join(_MEANINGS[name].split())).mark(name)
        made.on_value_change(lambda event: self._take(name, event.value))
        made.on("blur", self.refresh)  # what was left empty is the model's own
        self.inputs[name] = made

    def refresh(self) -> None:
        """Show what the form holds now."""
        for name, made in self.inputs.items():
            made.value = self._shown(name)
            made.set_enabled(name != "scale" or self.session.form.scales is None)

    def default_of(self, name: str) -> Any:
        """The value of a field that is not given: the request's, or the model's own."""
        default = SPECS[name].default
        return getattr(self.facts, name, None) if default is None else default

    def _shown(self, name: str) -> Any:
        """What the form holds; None for guidance by stage, which the timeline shows."""
        value = self.session.form.settings.get(name, self.default_of(name))
        return None if isinstance(value, tuple) else str(value) if name in TYPED else value

    def _take(self, name: str, value: Any) -> None:
        if value == self._shown(name):
            return  # it is what `refresh` has written
        if name in TYPED:
            value = as_number(value)
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        if value == self.default_of(name) or (value is None and SPECS[name].default is None):
            self.session.form.settings.pop(name, None)  # left empty, it is the model's
        else:
            self.session.form.settings[name] = value
        self._changed()
