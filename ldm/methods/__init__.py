"""Methods of personalisation: one file for each, and one line here.

A method of another package is named by its class, as in `my_package.MyMethod`, where `--allow_targets` allows it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from ldm.config import get_class
from ldm.methods import catversion, neti, null_text, prospect, stylediffusion, table
from ldm.methods.base import Method


def _inverted(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("This method is learned of one image and its prompt: python scripts/invert.py IMAGE --prompt …")


METHODS: dict[str, Method] = {
    "prospect": Method(prospect.check_vectors, table.load_table, prospect.ProSpect),
    "textual-inversion": Method(prospect.check_vectors, table.load_table, partial(table.learn_table, stages=1)),
    "xti": Method(table.check_table, table.load_table, partial(table.learn_table, stages=1, layers=True)),
    "table": Method(table.check_table, table.load_table, table.learn_table),
    "neti": Method(neti.check_mapper, neti.load_mapper, neti.learn_mapper),
    "catversion": Method(catversion.check_prefix, catversion.load_prefix, catversion.learn_prefix),
}
METHODS |= {
    change.method: Method(change.check, change.load, _inverted)
    for change in (stylediffusion.LearnedValues, null_text.NullContexts, null_text.TextContexts)
}


def find_method(name: str) -> Method:
    """Return how concepts of a method are read.

    Raises:
        ValueError: it is unknown, or of a package that is not allowed.
    """
    if name in METHODS:
        return METHODS[name]
    if "." not in name:
        raise ValueError(f"it was learned by the method '{name}', which is unknown here; known: {', '.join(METHODS)}.")
    found: Any = get_class(name)
    if not callable(getattr(found, "check", None)) or not callable(getattr(found, "load", None)):
        raise ValueError(f"'{name}' is no method: it has no check and no load.")
    return Method(found.check, found.load, found)
