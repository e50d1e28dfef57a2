"""Small things that tests share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import virtnet as vn

BROADCAST = b"\xff" * 6


def mac(i: int) -> bytes:
    """The address of station number ``i``."""
    return bytes([0x02, 0, 0, 0, 0, i])


def frame(to: bytes, sender: bytes, text: bytes = b"") -> bytes:
    """A frame of the local experimental type."""
    return (to + sender + b"\x88\xb5" + text).ljust(60, b"\0")


def receive(port: vn.Port, n: int = 1, timeout_s: float = 5.0) -> list[bytes]:
    """``n`` packets, fewer if they do not come."""
    found: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < n and time.monotonic() < deadline:
        found += [bytes(one) for one in port.rx(timeout_s=0.2)]
    return found


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    """Whether something comes true within a time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def descriptors() -> dict[str, str]:
    """What this process has open."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the listing's own
            continue
    return found


def threads() -> list[str]:
    """Names of the threads of this process that are ours."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append(Path(task, "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):  # it ended since it was listed
            continue
    return sorted(name for name in names if name.startswith("virtnet"))
