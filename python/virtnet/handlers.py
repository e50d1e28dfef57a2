"""Python in the path of packets: a function that looks at bursts, changes them, and says where they go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from virtnet.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from virtnet.burst import Burst
    from virtnet.net import Net
    from virtnet.nodes import Function, PortNode
    from virtnet.ports import MemoryPort

__all__ = ["BurstHandler", "Late"]

Late = Literal["pass", "drop", "hold"]

#: What a function is called with, and what it may answer; see :meth:`virtnet.Net.on_burst`.
OnBurst = Callable[["Burst"], Any]

#: The answers there always are, in the order of their numbers.
DROP, PASS = "drop", "pass"

#: How often a thread that waits looks whether its network still runs.
LOOK_S = 0.1

#: How long what is in Python's hands may take to come back before it is left behind.
SETTLE_S = 5.0


class BurstHandler:
    """A Python function in the path of packets, made by :meth:`virtnet.Net.on_burst`.

    The function runs in threads of its own, never twice at a time. As a context manager it is taken out at the end of
    the block.

    Attributes:
        function: the node that leads packets by Python.
        handled: packets the function was given, and that are on their way since.
        passed, dropped: packets it let go on, or dropped.
        sent: packets it sent elsewhere, by name.
        failed: packets of bursts for which it raised; they pass or are dropped as those that are late.
        error: what it raised last.
    """

    def __init__(
        self, handle: OnBurst, function: Function, sides: Mapping[str, PortNode], to: Mapping[str, PortNode], size: int
    ) -> None:
        """Made by the network: ``sides`` are the ports that packets come by, by the name of the node they come from."""
        self.function = function
        self.handled = self.passed = self.dropped = self.failed = 0
        self.sent: dict[str, int] = dict.fromkeys(to, 0)
        self.error: BaseException | None = None
        self._handle = handle
        self._net: Net = function.net
        self._sides = sides
        self._to = to
        self._ways = [DROP, PASS, *to]
        self._size = size
        self._turn = threading.Lock()
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, args=(came_from, port), name=f"virtnet-{function.name}", daemon=True)
            for came_from, port in sides.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def late(self) -> int:
        """Packets for which there was no time, whatever became of them."""
        return int(self.function.stats().detail.get("late", 0))

    @property
    def running(self) -> bool:
        """Whether packets are led by the function."""
        return not self._ended and self.function.name in self._net

    def stop(self) -> None:
        """Takes the function out of the path, when it has answered for what it was given; nobody loses a packet.

        Again does nothing. A function that takes longer than some seconds for its last bursts is not waited for.
        """
        net = self._net
        if self.running and net.running:
            self.function.set(enabled=False)
            self._settle()
        self._ended = True
        with net.change():
            if self.function.name in net:
                net._take_out(self.function)  # noqa: SLF001 - a part of the network
            for port in self._sides.values():
                if port.name in net:
                    net.remove(port)
            for port in self._to.values():
                if port.name in net:
                    net._take_injector_out(port)  # noqa: SLF001 - the same
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(SETTLE_S)

    def _settle(self) -> None:
        """Waits until what was led to Python has come back."""
        deadline = time.monotonic() + SETTLE_S
        while threading.current_thread() not in self._threads and time.monotonic() < deadline:
            stats = self._net.stats()
            sides = [(stats.ports[port.name], _end(port).stats()) for port in self._sides.values()]
            others = [(stats.ports[port.name], _end(port).stats()) for port in self._to.values()]
            is_taken = stats.in_transit == 0 and all(inner.sent == end.received for inner, end in sides)
            is_answered = sum(end.received for _, end in sides) == self.handled
            if is_taken and is_answered and all(inner.received == end.sent for inner, end in sides + others):
                return
            time.sleep(0.001)

    def _run(self, came_from: str, port: PortNode) -> None:
        end = _end(port)
        while not self._ended:
            try:
                with end.rx(LOOK_S, max_packets=self._size) as burst:
                    if len(burst):
                        burst.came_from = came_from
                        with self._turn:
                            self._answer(burst, end)
                            self.handled += len(burst)
                    elif self._is_over(port):
                        return
            except StateError:
                return  # closed

    def _is_over(self, port: PortNode) -> bool:
        """Whether nothing can come any more: the port was removed, or the network is stopped."""
        return port.name not in self._net or self._net._ended  # noqa: SLF001 - a part of the network

    def _answer(self, burst: Burst, end: MemoryPort) -> None:
        """Has the function decide, and does what it says."""
        import numpy as np

        n = len(burst)
        try:
            ways = self._decoded(self._handle(burst), n)
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises, the network goes on
            self._complain(error)
            self.failed += n
            if self.function.spec.options["late"] == "pass":
                self._send(burst, end)
            return
        for way in np.unique(ways):
            chosen = burst if (ways == way).all() else burst[ways == way]
            name = self._ways[way]
            if name == DROP:
                self.dropped += len(chosen)
            elif name == PASS:
                self._send(chosen, end)
                self.passed += len(chosen)
            else:
                self._send(chosen, _end(self._to[name]))
                self.sent[name] += len(chosen)

    def _decoded(self, answer: Any, n: int) -> NDArray[np.intp]:
        """The number of the way of each packet."""
        import numpy as np

        if answer is None:
            return np.ones(n, np.intp)
        given = np.asarray(answer)
        if given.dtype.kind not in "biuU":
            raise ConfigError(
                f"on_burst: the function answers with None, or for each packet with True (pass), False (drop), "
                f"a number or a name of {self._ways}; found {given.dtype}"
            )
        if given.dtype.kind == "U":
            numbers = np.full(given.shape, -1, np.intp)
            for number, name in enumerate(self._ways):
                numbers[given == name] = number
        else:
            numbers = given.astype(np.intp)
        if numbers.shape not in {(), (n,)}:
            raise ConfigError(f"on_burst: the function was given {n} packets and answered for {numbers.shape}")
        bad = (numbers < 0) | (numbers >= len(self._ways))
        if bad.any():
            raise ConfigError(f"on_burst: {given[bad].flat[0]!r} is none of {self._ways}: name others with to=")
        return np.broadcast_to(numbers, (n,))

    def _send(self, burst: Burst, end: MemoryPort) -> None:
        """Sends all packets; workers take them soon, unless the network ends."""
        at = 0
        while at < len(burst) and not self._ended:
            at += end.tx(burst[at:] if at else burst)
            if at < len(burst):
                time.sleep(0.0005)

    def _complain(self, error: Exception) -> None:
        """Tells of an error once, not for every burst."""
        import logging

        if type(error) is not type(self.error) or str(error) != str(self.error):
            log = logging.getLogger("virtnet")
            log.error("on_burst: the function of %r raised", self.function.name, exc_info=error)
        self.error = error

    def __enter__(self) -> Self:
        """The handler."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Takes it out."""
        self.stop()

    def __repr__(self) -> str:
        """What it has done."""
        state = "runs" if self.running else "stopped"
        sent = "".join(f", {n} to {name!r}" for name, n in self.sent.items())
        counts = f"{self.handled} handled, {self.passed} passed, {self.dropped} dropped{sent}"
        return f"<burst handler {self.function.name!r} {state}: {counts}>"


def ways_of(to: Sequence[Any]) -> list[str]:
    """The names that packets can be sent to."""
    names = [node.name for node in to]
    for name in names:
        if name in {DROP, PASS} or names.count(name) > 1:
            raise ConfigError(
                f"on_burst: to= names each node once, and none that is called pass or drop, found {name!r}"
            )
    return names


def _end(port: PortNode) -> MemoryPort:
    """Python's end of a memory port, which these all are."""
    if port.end is None:
        raise StateError(f"{port.name!r} has no end in Python")
    return port.end
