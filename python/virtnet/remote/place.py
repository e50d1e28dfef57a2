"""Where a network's socket is, and whose it is.

A socket that somebody serves is never taken over; one that nobody serves any more is replaced. Both are decided while
the directory is locked, so that of two that come at once one is first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from virtnet.errors import ConfigError, PortError, StateError
from virtnet.spec import SOCKET_PATH_MAX, meant

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Listener", "check_name", "find", "networks"]

#: What a file may be called that is nobody's surprise.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

#: Who locks the directory does so for the time of a few system calls.
LOCK_S = 2.0

#: So many may wait to be attended to.
BACKLOG = 64


def check_name(name: str) -> str:
    """The name, if a network can have it.

    Raises:
        ConfigError: it cannot.
    """
    if "/" in name:
        if len(name.encode()) > SOCKET_PATH_MAX or "\0" in name:
            raise ConfigError(f"a socket's path has at most {SOCKET_PATH_MAX} bytes, found {name!r}")
    elif not NAME.fullmatch(name):
        raise ConfigError(
            "a network's name has 1 to 64 letters, digits, points, dashes and underscores, and begins with none of the "
            f"first two marks; found {name!r}"
        )
    return name


def networks() -> tuple[str, ...]:
    """The names of this user's networks that run and can be attached to.

    Example:
        >>> import virtnet as vn
        >>> with vn.Net(name="doc-networks"):
        ...     "doc-networks" in vn.networks()
        True
    """
    found = set()
    for folder in _folders():
        if _is_private(folder) is None:
            found |= {path.stem for path in folder.glob("*.sock") if _is_served(path)}
    return tuple(sorted(found))


def find(name: str) -> Path:
    """The socket of a network that runs.

    Raises:
        ConfigError: there can be no such name.
        StateError: there is none.
    """
    check_name(name)
    candidates = [Path(name)] if "/" in name else [folder / f"{name}.sock" for folder in _folders()]
    for path in candidates:
        if path.exists() and ("/" in name or _is_private(path.parent) is None):
            return path
    running = networks()
    there = f"there is {', '.join(running)}{meant(name, running)}" if running else "none of this user's does"
    raise StateError(f"no network {name!r} runs that can be attached to: {there}")


class Listener:
    """A socket that listens for those who want to attach.

    Attributes:
        path: where it is.
        socket: the socket; it does not block.
    """

    def __init__(self, path: Path, bound: socket.socket) -> None:
        """Made by :meth:`open`."""
        self.path = path
        self.socket = bound
        self._identity = _identity(path)

    @classmethod
    def open(cls, name: str) -> Listener:
        """Listens under a name.

        Raises:
            ConfigError: there can be no such name.
            PortError: a network of that name runs, or the system refused.
        """
        check_name(name)
        path = Path(name) if "/" in name else _own_folder() / f"{name}.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ConfigError(f"a socket's path has at most {SOCKET_PATH_MAX} bytes, found {path}: take a shorter name")
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            # The file gets the socket's own mode: there is no moment in which others could connect.
            os.fchmod(bound.fileno(), 0o600)
            try:
                with _locked(path.parent):
                    _make_room(path, name)
                    bound.bind(str(path))
                    bound.listen(BACKLOG)
                    listener = cls(path, bound)
            except PortError:
                raise
            except OSError as error:
                raise PortError(error.errno, f"cannot listen on {path}: {error.strerror}") from error
            undo.pop_all()
        return listener

    def close(self) -> None:
        """Stops listening and takes the file away, if it is still this one. Again does nothing."""
        if self.socket.fileno() < 0:
            return
        with contextlib.suppress(OSError, PortError), _locked(self.path.parent):
            if _identity(self.path) == self._identity:
                self.path.unlink()
        self.socket.close()


def _folders() -> list[Path]:
    """Where sockets with names are looked for; the first is where they are made."""
    fallback = Path(f"/tmp/virtnet-{os.geteuid()}")  # noqa: S108 - checked to be private
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return [Path(runtime, "virtnet"), fallback] if runtime and Path(runtime).is_dir() else [fallback]


def _own_folder() -> Path:
    """The directory for sockets with names, made if it is missing; nobody else can have put something there."""
    folder = _folders()[0]
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        problem = _is_private(folder)
    except OSError as error:
        raise PortError(error.errno, f"cannot make {folder} for the sockets of networks: {error.strerror}") from error
    if problem:
        raise PortError(
            errno.EACCES, f"the sockets of networks need a directory of their own, and {folder} {problem}: remove it"
        )
    return folder


def _is_private(folder: Path) -> str | None:
    """What keeps a directory from being this user's alone, if there is anything."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return "is not there"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _make_room(path: Path, name: str) -> None:
    """Removes a socket that nobody serves."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PortError(errno.EEXIST, f"{path} is there already and no socket: take another name")
    if _is_served(path):
        raise PortError(errno.EADDRINUSE, f"a network {name!r} runs already ({path}): stop it, or take another name")
    path.unlink()


def _is_served(path: Path) -> bool:
    """Whether somebody listens there. Where many wait already, somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as caller:
        return caller.connect_ex(str(path)) not in {errno.ECONNREFUSED, errno.ENOENT, errno.EACCES}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """In the block nobody else makes or removes sockets there."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PortError(errno.EBUSY, f"somebody keeps {folder} locked") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(opened)
