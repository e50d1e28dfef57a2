"""Fixtures for tests against other implementations: where they run, what they run, and that nothing stays behind.

``tests/peers/install.sh`` installs what they need, ``pytest -m peer`` runs them. Where something is missing they are
skipped and say what; ``VIRTNET_REQUIRE_PEERS=1`` makes that a failure, so that CI cannot skip what it is there to show.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# The helpers of this folder are plain modules beside the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import backend
import guest
import image


def unavailable(reason: str) -> None:
    """Skips the test, or fails it where the peers must be there."""
    if os.environ.get("VIRTNET_REQUIRE_PEERS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def guest_image() -> image.Image:
    """The kernel and initramfs of the guests."""
    try:
        guest.find_qemu()
        return image.image()
    except image.MissingPeerError as missing:
        unavailable(str(missing))
        raise


@pytest.fixture(scope="session")
def newer_guest_image() -> image.Image:
    """The same with a kernel of Debian's backports."""
    try:
        guest.find_qemu()
        return image.newer_image()
    except image.MissingPeerError as missing:
        unavailable(str(missing))
        raise


@pytest.fixture(scope="session")
def backend_command() -> str:
    """The back-end to test."""
    try:
        return backend.command_template()
    except image.MissingPeerError as missing:
        unavailable(str(missing))
        raise


@pytest.fixture
def directory(request):
    """A directory for sockets and logs, kept when the test fails.

    Not pytest's own: a socket's path may have 107 bytes at most.
    """
    path = Path(tempfile.mkdtemp(prefix="virtnet-"))
    yield path
    failed = any(getattr(report, "failed", False) for report in getattr(request.node, "reports", ()))
    if not failed:
        shutil.rmtree(path, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Remembers how a test went, for the fixtures that tidy up after it, and adds the logs' place to a failure."""
    report = yield
    item.reports = [*getattr(item, "reports", ()), report]
    path = getattr(item, "funcargs", {}).get("directory")
    # A failed teardown may come after the directory has been removed.
    if report.failed and isinstance(path, Path) and path.is_dir():
        report.sections.append(("logs", f"kept in {path}: {', '.join(sorted(file.name for file in path.iterdir()))}"))
    return report


@pytest.fixture
def running():
    """Ends what a test enters into it, in the opposite order, however the test ends."""
    with contextlib.ExitStack() as stack:
        yield stack
