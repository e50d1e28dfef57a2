"""Captures in a network of another process, held by whoever asked for them."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Self

from virtnet.errors import PeerError, PeerGone

if TYPE_CHECKING:
    from virtnet.burst import Burst
    from virtnet.remote.lines import Answers

__all__ = ["AttachedCapture", "AttachedColumns"]

#: How often an end is looked for.
LOOK_S = 0.1

#: How often packets are asked for while somebody waits for them.
FETCH_S = 0.01

#: A burst as it travels: bytes, starts, lengths, offload metadata, times, lengths on the wire, origins.
PARTS = 7


class AttachedCapture:
    """A capture in a network of another process; as a context manager it is stopped at the end of the block.

    Attributes:
        name: of the port that writes, there.
        places: the names of the places, in the order in which they were given.
        packets: packets written, known when it has ended.
        dropped: packets that were to be written and were not, likewise.
        why: why it has ended by itself, ``None`` if it has not.
    """

    def __init__(self, connection: socket.socket, answers: Answers, begun: dict[str, Any], timeout_s: float) -> None:
        """Made by :meth:`AttachedNet.capture`; ``begun`` is what the first answer was."""
        self.name = str(begun["name"])
        self.places = tuple(map(str, begun.get("places", ())))
        self.packets = 0
        self.dropped = 0
        self.why: str | None = None
        self._connection = connection
        self._answers = answers
        self._timeout_s = timeout_s

    @property
    def running(self) -> bool:
        """Whether its end is not known here yet."""
        return self._connection.fileno() >= 0

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it has ended by itself; whether that happened within the time given."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.running:
            left = LOOK_S if deadline is None else max(0.0, min(LOOK_S, deadline - time.monotonic()))
            if wait_readable(self._connection, left):
                self._end()
            elif deadline is not None and time.monotonic() > deadline:
                return False
        return True

    def stop(self) -> None:
        """Ends it; what has passed before is written. Again does nothing.

        Raises:
            StateError: the network does not answer.
        """
        if self.running:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
            self._end()

    def _end(self) -> None:
        try:
            ended = self._answers.next(self._timeout_s)
        except PeerGone:
            self.why = "the network has ended"
        else:
            self.packets, self.dropped, self.why = int(ended["packets"]), int(ended["dropped"]), ended["why"]
        finally:
            self._connection.close()

    def __enter__(self) -> Self:
        """The capture."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stops it."""
        self.stop()


class AttachedColumns(AttachedCapture):
    """A capture in a network of another process, to be read as packets with columns.

    Packets wait there, in as much memory as was said, until they are fetched here. What came before the end can be read
    after it. ``packets`` counts what was fetched; ``dropped``, what found no room there, is as of the last fetch.
    """

    def __init__(
        self,
        connection: socket.socket,
        answers: Answers,
        begun: dict[str, Any],
        timeout_s: float,
        most: int,
    ) -> None:
        """Made by :meth:`AttachedNet.capture`; ``most`` is how many bytes may come at once."""
        super().__init__(connection, answers, begun, timeout_s)
        self._most = most
        #: What came with the end.
        self._last: Burst | None = None

    def read(self, timeout_s: float | None = 0.0) -> Burst:
        """All packets since the last time, as one burst; see :meth:`virtnet.capturing.ColumnsCapture.read`.

        Args:
            timeout_s: seconds to wait for the first one; ``None`` waits as long as the capture goes on.

        Raises:
            StateError: the network does not answer.
            PeerGone: it has ended without telling what was left.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.running:
            found = self._fetch()
            if len(found) or (deadline is not None and time.monotonic() >= deadline):
                return found
            time.sleep(FETCH_S)
        last, self._last = self._last, None
        return self._burst([b""] * PARTS) if last is None else last

    def _fetch(self) -> Burst:
        self._connection.settimeout(self._timeout_s)
        with contextlib.suppress(OSError):  # it has ended: what it said last is there to be read
            self._connection.sendall(b"\n")
        return self._receive()

    def _receive(self) -> Burst:
        """The packets of the next answer; after the last ones what the capture ends with."""
        try:
            said = self._answers.next(self._timeout_s)
            sizes, is_last = self._understood(said)
            found = self._burst([self._answers.bytes(size, self._timeout_s) for size in sizes])
        except BaseException as error:
            self.why = str(error)
            self._connection.close()
            raise
        if is_last:
            super()._end()
        return found

    def _understood(self, said: Any) -> tuple[list[int], bool]:
        """How long the parts are that follow, and whether they are the last."""
        try:
            sizes, is_last = [int(size) for size in said["sizes"]], bool(said["last"])
            self.packets, self.dropped = int(said["packets"]), int(said["dropped"])
        except (KeyError, TypeError, ValueError):
            raise PeerError(f"packets were expected, found {said!r}") from None
        if len(sizes) != PARTS or min(sizes) < 0 or sum(sizes) > self._most:
            raise PeerError(f"{PARTS} parts of at most {self._most} bytes were expected, found {sizes}")
        return sizes, is_last

    def _burst(self, parts: list[bytes]) -> Burst:
        from virtnet.burst import Burst

        data, starts, lengths, offloads, times, wire_lengths, origins = parts
        return Burst._recorded(  # noqa: SLF001 - a constructor of it
            (bytearray(data), starts, lengths, bytearray(offloads), times, wire_lengths, origins), self.places
        )

    def _end(self) -> None:
        with contextlib.suppress(PeerGone):
            self._last = self._receive()


def wait_readable(connection: socket.socket, seconds: float) -> bool:
    """Whether something can be read within a time."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
