"""What the tabs of one open page share: the session, where they are shown, and who follows the form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nicegui import ui

from ldm.cli.edit import PNG_KEY as EDIT_KEY
from ldm.files.images import image_info
from ldm.files.records import PNG_KEY, read_parameters
from ldm.page import parts
from ldm.page.compare import GRID_KEY, read_sheet
from ldm.page.session import Session

TABS = ("Generate", "Learn", "Compare", "Edit", "Export")


class View:
    """One open page.

    Args:
        session: of this browser tab.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tabs: ui.tabs | None = None
        self._followers: list[Callable[[], None]] = []

    def follow_form(self, refresh: Callable[[], None]) -> None:
        """Call `refresh` when something else than its own inputs has changed the form."""
        self._followers.append(refresh)

    def form_changed(self) -> None:
        for refresh in self._followers:
            refresh()

    @staticmethod
    def is_ours(file: Path) -> bool:
        """Whether an image says how it was made."""
        return bool({PNG_KEY, GRID_KEY, EDIT_KEY} & image_info(file).keys())

    def restore(self, file: Path) -> str:
        """Fill in the form that an image was made with; returns the tab that has it, '' where it cannot be used."""
        try:
            tab = self._restore(file)
        except (ValueError, OSError) as error:
            parts.say(error)
            return ""
        self.form_changed()
        self.show(tab)
        return tab

    def _restore(self, file: Path) -> str:
        session, info = self.session, image_info(file)
        if EDIT_KEY in info:
            session.edit.restore(str(info[EDIT_KEY]))
            return "Edit"
        axes, record = read_sheet(str(info[GRID_KEY])) if GRID_KEY in info else ([], read_parameters(file))
        session.form.restore(record, session.engine.facts)
        if not axes:
            return "Generate"
        session.compare.rows, session.compare.columns = ((axis.kind, "\n".join(axis.values)) for axis in axes)
        return "Compare"

    def show(self, tab: str) -> None:
        if self.tabs is not None:
            self.tabs.value = tab
