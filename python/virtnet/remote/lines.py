"""What is said on a network's socket: a request in a line of JSON, and an answer in another.

::

    {"virtnet": 1, "do": "stats", "with": {}}
    {"virtnet": 1, "result": {...}}
    {"virtnet": 1, "error": {"kind": "ConfigError", "message": "...", "errno": null}}

A connection is one request and its answer. Only a capture has two: the first says that it has begun, and the second,
when the caller has closed its side or the capture has ended by itself, what was captured. With its request travels the
descriptor that is written to. One into columns needs none: after its first answer each empty line asks for packets,
and the answer has the sizes of the parts of a burst, which follow it as they are; the last ones come before the end,
unasked. The number is that of this form; what does not know it says so.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from virtnet import errors
from virtnet.errors import ConfigError, PeerError, PeerGone, StateError, VirtnetError

__all__ = ["ANSWER_MAX", "REQUEST_MAX", "VERSION", "Answers", "answer", "error_of", "error_to", "read_line", "request"]

VERSION = 1

#: The longest line of each side. A request's longest is a description of a network, an answer's what has happened at
#: all ports.
REQUEST_MAX = 4 << 20
ANSWER_MAX = 64 << 20

#: Bytes taken at a time.
CHUNK = 1 << 16

#: What a request may be refused with, by the name under which it travels.
ERRORS: dict[str, type[VirtnetError]] = {
    name: found
    for name in errors.__all__
    if isinstance(found := getattr(errors, name), type) and issubclass(found, VirtnetError)
}


def request(do: str, arguments: dict[str, Any]) -> bytes:
    """A request as a line."""
    return _line({"do": do, "with": arguments})


def answer(result: Any) -> bytes:
    """An answer as a line."""
    return _line({"result": result})


def error_to(error: BaseException) -> bytes:
    """A refusal as a line. What was not foreseen is told as it is."""
    known = isinstance(error, VirtnetError)
    kind = type(error).__name__ if known else "VirtnetError"
    message = str(error) if known else f"the network's process failed at this: {type(error).__name__}: {error}"
    return _line({"error": {"kind": kind, "message": message, "errno": getattr(error, "errno", None)}})


def error_of(said: Any) -> VirtnetError:
    """The exception that a refusal means."""
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        return PeerError(f"a refusal with a message was expected, found {said!r}")
    kind = ERRORS.get(str(said.get("kind")), VirtnetError)
    if issubclass(kind, OSError):
        number = said.get("errno")
        return kind(number if isinstance(number, int) else 0, said["message"])
    return kind(said["message"])


def read_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """What a line asks for.

    Raises:
        ConfigError: it is no request.
    """
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a request is a line of JSON: {error}") from None
    if not isinstance(said, dict) or said.get("virtnet") != VERSION:
        found = said.get("virtnet") if isinstance(said, dict) else said
        raise ConfigError(
            f'this network is asked with {{"virtnet": {VERSION}, ...}}, found {str(found)[:80]!r}: '
            "ask with the virtnet that runs it"
        )
    do, arguments = said.get("do"), said.get("with", {})
    if not isinstance(do, str) or not isinstance(arguments, dict):
        raise ConfigError('a request has "do", a word, and "with", an object')
    return do, arguments


class Answers:
    """The answers that come on a connection, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        """Reads from a connection, which stays the caller's."""
        self._connection = connection
        self._rest = bytearray()

    def next(self, timeout_s: float | None) -> Any:
        """The next answer's result.

        Raises:
            PeerGone: the other end has left before.
            PeerError: it said something else.
            StateError: it says nothing in time.
            VirtnetError: the refusal that it answered.
        """
        try:
            line = read_line(self._connection, self._rest, ANSWER_MAX, timeout_s)
        except TimeoutError:
            raise StateError(f"the network does not answer within {timeout_s:g} s: it is busy, or halted") from None
        except OSError as error:
            raise PeerGone(f"the network has ended: {error}") from None
        if line is None:
            raise PeerGone("the network has ended before it answered")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PeerError(f"an answer is a line of JSON: {error}") from None
        if not isinstance(said, dict) or said.get("virtnet") != VERSION:
            raise PeerError(f'an answer begins with {{"virtnet": {VERSION}, found {line[:80]!r}')
        if "error" in said:
            raise error_of(said["error"])
        return said.get("result")

    def bytes(self, n: int, timeout_s: float) -> bytes:
        """The next ``n`` bytes, which follow an answer that has said so; ``timeout_s`` is for each piece of them.

        Raises:
            PeerGone: the other end has left before.
            StateError: they do not come in time.
        """
        try:
            while len(self._rest) < n:
                if not (chunk := _next_chunk(self._connection, time.monotonic() + timeout_s)):
                    raise PeerGone("the network has ended before it had answered")
                self._rest += chunk
        except TimeoutError:
            raise StateError(f"the network does not answer within {timeout_s:g} s: it is busy, or halted") from None
        except ConnectionError as error:
            raise PeerGone(f"the network has ended: {error}") from None
        found = bytes(memoryview(self._rest)[:n])
        del self._rest[:n]
        return found


def _next_chunk(connection: socket.socket, deadline: float | None) -> bytes:
    """What has come, empty at the end; TimeoutError if nothing does in time."""
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    return connection.recv(CHUNK)


def read_line(connection: socket.socket, rest: bytearray, most: int, timeout_s: float | None) -> bytes | None:
    """The next line, without its end; ``None`` if the other end has closed before it was whole.

    ``rest`` holds what has come and belongs to the lines behind it.

    Raises:
        TimeoutError: it was not whole in time.
        ConfigError: it is longer than ``most``.
        OSError: the connection broke.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    looked_at = 0
    while (end := rest.find(b"\n", looked_at)) < 0:
        looked_at = len(rest)
        if len(rest) > most:
            raise ConfigError(f"a line here has at most {most} bytes")
        if not (chunk := _next_chunk(connection, deadline)):
            return None
        rest += chunk
    line = bytes(rest[:end])
    del rest[: end + 1]
    return line


def receive_request(connection: socket.socket, timeout_s: float) -> tuple[bytes | None, list[int]]:
    """The line of a request, and the descriptors that came with it, which are the caller's from now on.

    Raises:
        TimeoutError, ConfigError, OSError: as for :func:`read_line`; the descriptors are closed.
    """
    kept: list[int] = []
    try:
        connection.settimeout(timeout_s)
        # Those that are passed come with the first bytes.
        first, found, _flags, _address = socket.recv_fds(connection, CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
        kept += found
        rest = bytearray(first)
        return (read_line(connection, rest, REQUEST_MAX, timeout_s) if first else None), kept
    except BaseException:
        for descriptor in kept:
            os.close(descriptor)
        raise


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps({"virtnet": VERSION, **said}, separators=(",", ":")).encode() + b"\n"
