"""What several tests need: sockets in a short directory, and the proof that nothing is left behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers import descriptors, eventually, threads

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """Where networks with a name listen: not where those of the user do who runs the tests."""
    with tempfile.TemporaryDirectory(prefix="vn-run-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="vn-") as folder:
        yield Path(folder)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No descriptor and no thread is left behind by the test."""
    gc.collect()
    open_before, running_before = descriptors(), threads()
    yield
    gc.collect()
    assert eventually(lambda: len(descriptors()) <= len(open_before)), {
        k: v for k, v in descriptors().items() if k not in open_before
    }
    assert eventually(lambda: threads() == running_before), (running_before, threads())
