"""The compiled half of the package: private, use what `virtnet` exports."""

from typing import Final

__all__ = ["__version__", "build_info"]

__version__: Final[str]

def build_info() -> dict[str, str]:
    """Version, profile (``release`` or ``debug``) and target of the compiled module."""
