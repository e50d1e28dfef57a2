"""What an option of a port is: how its value is read, checked and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Option", "no"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a kind of port: how its value is read, checked and written.

    ``check`` takes text or a value and returns the value, or raises ``ValueError`` when it is none.
    """

    name: str
    expects: str
    check: Callable[[Any], Any]
    write: Callable[[Any], str] = str
    default: Any = None
    #: What a file may have for it, as JSON Schema.
    schema: Mapping[str, Any] = field(default_factory=dict)
    #: Has to be said.
    required: bool = False


def no() -> NoReturn:
    """This is no value of the option."""
    raise ValueError
