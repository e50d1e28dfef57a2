"""What callers have given, in the form in which options are checked; what has no such form is refused there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from virtnet.nodes import Node

__all__ = ["by_name", "is_number", "table", "texts"]


def table(given: Any) -> Any:
    """A table as one of its own; an empty one if none was given."""
    return dict(given) if isinstance(given, Mapping) else {} if given is None else given


def by_name(given: Any) -> Any:
    """A table by nodes, or by their names, as one by names."""
    found = table(given)
    if not isinstance(found, dict):
        return found
    return {(end.name if isinstance(end, Node) else end): value for end, value in found.items()}


def texts(given: Any) -> Any:
    """One text, or several, as a list."""
    if isinstance(given, str):
        return [given]
    return list(given) if isinstance(given, Iterable) else given


def is_number(given: Any) -> bool:
    """Whether it can be compared with a number."""
    return isinstance(given, Real) and not isinstance(given, bool)
