"""Virtual networks in Python at Rust speed."""

from virtnet._virtnet import __version__, build_info

__all__ = ["__version__", "build_info"]
