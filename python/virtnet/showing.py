"""How values look in a notebook: HTML of tables and texts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["escape", "table", "text"]


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table; nothing in its cells is taken for HTML."""

    def row(tag: str, cells: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row('th', heads)}{''.join(row('td', cells) for cells in rows)}</table>"


def text(value: object) -> str:
    """What is printed, with its columns."""
    return f"<pre>{escape(str(value))}</pre>"
