"""The side that asks: a handle of a network in another process, which looks like :class:`~virtnet.Net` where it can."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from virtnet.capturing import check_room, filters_of, open_target, places_of
from virtnet.description import Plan, Spec
from virtnet.errors import ConfigError, PeerError, PortError, StateError, VirtnetError
from virtnet.kinds import FRAME_MAX
from virtnet.nodes import Function, Node, PortNode
from virtnet.remote.captures import LOOK_S, AttachedCapture, AttachedColumns
from virtnet.remote.lines import Answers, request
from virtnet.remote.place import find

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtnet.capturing import Place, Target
    from virtnet.net import Net
    from virtnet.stats import NetStats

__all__ = ["AttachedNet", "attach"]


def attach(name: str, *, timeout_s: float = 30.0) -> AttachedNet:
    """A handle of a network that runs in another process of the same user.

    Args:
        name: its name, or the path of its socket, which has a slash in it.
        timeout_s: seconds that it may take to answer, each time it is asked.

    Raises:
        ConfigError: there can be no such name.
        StateError: no network of that name runs, or it does not answer.

    Example:
        >>> import virtnet as vn
        >>> with vn.Net(name="doc-attach") as net:
        ...     _ = net.memory("a") >> net.switch(name="sw")
        ...     lab = vn.attach("doc-attach")  # works from any process
        ...     print(lab["a"].state, lab.stats().balance().exact)
        0 received, 0 sent True
    """
    attached = AttachedNet(name, find(name), timeout_s)
    attached.refresh()
    return attached


class AttachedNet:
    """A network that runs in another process. Nothing is kept open: every use asks anew.

    ``lab["vm1"]`` is a handle of a port or function there: its ``stats()``, ``events``, ``rings`` and ``explain()`` are
    those of :class:`~virtnet.PortNode`.

    Attributes:
        name: its name.
        path: its socket.
        pid: the process that runs it.
        directory: where relative paths in its description begin.
        timeout_s: seconds that it may take to answer.
    """

    def __init__(self, name: str, path: Path, timeout_s: float) -> None:
        """Made by :func:`attach`."""
        self.name = name
        self.path = path
        self.timeout_s = timeout_s
        self.pid = 0
        self.directory = ""

    def refresh(self) -> None:
        """Asks who it is; done by :func:`attach`."""
        about = self._ask("about")
        self.pid, self.directory = int(about["pid"]), str(about["directory"])

    @property
    def spec(self) -> Spec:
        """What the network is described as now."""
        return Spec.from_dict(self._ask("spec"))

    def plan(self, spec: Spec) -> Plan:
        """What :meth:`apply` would do; nothing is done."""
        return Plan(self.spec, spec)

    def apply(self, spec: Spec) -> Plan:
        """Makes the network what a specification says, wholly or not at all; see :meth:`virtnet.Net.apply`.

        Relative paths in it begin in :attr:`directory`.
        """
        return self._planned(self._ask("apply", spec=spec.to_dict()))

    def rollback(self) -> Plan:
        """Takes back the last change that was applied; see :meth:`virtnet.Net.rollback`."""
        return self._planned(self._ask("rollback"))

    def stats(self) -> NetStats:
        """The counters now."""
        from virtnet.stats import NetStats

        return NetStats.from_dict(self._ask("stats"))

    @overload
    def capture(
        self,
        where: Place | list[Place],
        to: None = None,
        *,
        filter: str | Sequence[str] = "",
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
    ) -> AttachedColumns: ...
    @overload
    def capture(
        self,
        where: Place | list[Place],
        to: Target,
        *,
        filter: str | Sequence[str] = "",
        overwrite: bool = False,
    ) -> AttachedCapture: ...
    def capture(
        self,
        where: Place | list[Place],
        to: Target | None = None,
        *,
        filter: str | Sequence[str] = "",  # noqa: A002 - what everybody calls it
        overwrite: bool = False,
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
    ) -> AttachedCapture | AttachedColumns:
        """Writes down what passes a place of the network until it is stopped; see :meth:`virtnet.Net.capture`.

        What is written to is opened here, with the rights and the working directory of this process, and written by the
        process of the network. A FIFO is waited for until somebody reads it. Packets that are to be read as columns
        wait in memory of the network's process until they are fetched.

        Args:
            where: a node or its name, or two for the cable between them; or a list of such places.
            to: a file, a FIFO, ``-`` for standard output, an open file or descriptor. Nothing: to be read as columns.
            filter: which packets, in the language of tcpdump: one for all places, or one for each.
            overwrite: write over a file that exists.
            snap: of a capture into columns, how many bytes of each packet are kept.
            memory: of the same, bytes that hold what was not fetched yet; what comes when they are full is dropped
                there, and counted.

        Raises:
            ConfigError: there is no such place, no such filter, or the file exists.
            PortError: the file cannot be made.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net(name="doc-columns") as net:
            ...     a, b = net.memory("a"), net.memory("b")
            ...     _ = a >> b
            ...     with vn.attach("doc-columns").capture("a") as capture:  # works from any process
            ...         _ = a.end.tx([bytes(60), bytes(1500)])
            ...         len(b.end.rx(timeout_s=5)) and capture.read(timeout_s=5).columns.length
            View(array([  60, 1500], dtype=uint32))
        """
        places = places_of(where)
        wanted: dict[str, Any] = {
            "where": [_named(place) for place in places] if isinstance(where, list) else _named(where),
            "filter": filter if isinstance(filter, str) else filters_of(filter, len(places)),
        }
        if to is None:
            check_room(snap, memory)
            with contextlib.ExitStack() as failing:
                connection = failing.enter_context(self._connected())
                self._send(connection, request("columns", wanted | {"snap": snap, "memory": memory}))
                answers = Answers(connection)
                begun = answers.next(self.timeout_s)
                failing.pop_all()
            return AttachedColumns(connection, answers, begun, self.timeout_s, 2 * memory)
        is_pcap = isinstance(to, str | os.PathLike) and Path(to).suffix.lower() == ".pcap"
        with contextlib.ExitStack() as failing:
            target, made = _open_here(to, overwrite=overwrite)
            if made is not None:
                failing.callback(made.unlink, missing_ok=True)
            try:
                connection = failing.enter_context(self._connected())
                self._send(connection, request("capture", wanted | {"pcap": is_pcap}), [target])
            finally:
                os.close(target)
            answers = Answers(connection)
            begun = answers.next(self.timeout_s)
            failing.pop_all()
        return AttachedCapture(connection, answers, begun, self.timeout_s)

    def stop(self) -> None:
        """Stops the network: its ports are closed, and a program that serves it goes on behind that."""
        self._ask("stop")

    @property
    def running(self) -> bool:
        """Whether it runs still."""
        try:
            self._ask("about")
        except VirtnetError:
            return False
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the network is stopped; whether that happened within the time given."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.running:
            left = LOOK_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, LOOK_S))
        return True

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        spec = self.spec
        net = cast("Net", self)
        if name in spec.ports:
            return PortNode(net, name, spec.ports[name])
        if name in spec.functions:
            return Function(net, name, spec.functions[name])
        there = ", ".join([*spec.ports, *spec.functions]) or "nothing yet"
        raise ConfigError(f"there is no node {name!r} in the network: there is {there}")

    def __contains__(self, name: object) -> bool:
        """Whether there is a node of that name."""
        spec = self.spec
        return name in spec.ports or name in spec.functions

    def __iter__(self) -> Iterator[Node]:
        """The nodes, ports first."""
        spec = self.spec
        net = cast("Net", self)
        yield from (PortNode(net, name, port) for name, port in spec.ports.items())
        yield from (Function(net, name, function) for name, function in spec.functions.items())

    def __repr__(self) -> str:
        """Which network of which process."""
        return f"<AttachedNet {self.name!r} of process {self.pid}>"

    def cable(self, _a: Node, _b: Node) -> None:
        """Refused: what runs elsewhere is changed as a whole."""
        raise StateError("a network of another process is changed by apply(spec)")

    def remove(self, _node: Node | str) -> None:
        """Refused likewise."""
        raise StateError("a network of another process is changed by apply(spec)")

    # What nodes ask their network for.

    def _events(self, port: str, first: int) -> tuple[list[dict[str, Any]], int]:
        events, dropped = self._ask("events", port=port, first=first)
        return events, dropped

    def _rings(self, port: str) -> list[dict[str, Any]]:
        return list(self._ask("rings", port=port))

    def _set_link(self, port: PortNode, up: bool) -> None:
        self._ask("set_link", port=port.name, up=up)

    def _command(self, port: PortNode, name: str, arguments: dict[str, Any]) -> None:
        self._ask("command", port=port.name, command=name, arguments=to_numbers(arguments))

    def _device_stats(self, port: PortNode, asked: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        answers = self._ask("device_stats", port=port.name, asked=asked)
        return [(queue, counts) for queue, counts in answers]

    def _device_state(self, port: PortNode, state: bytes | None) -> bytes:
        saved = self._ask("device_state", port=port.name, state=None if state is None else state.hex())
        return bytes.fromhex(saved)

    # Inside.

    def _ask(self, do: str, **arguments: Any) -> Any:
        with self._connected() as connection:
            self._send(connection, request(do, arguments))
            return Answers(connection).next(self.timeout_s)

    def _connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout_s)
            connection.connect(str(self.path))
        except BaseException as error:
            connection.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise StateError(f"the network {self.name!r} has ended") from None
            if isinstance(error, TimeoutError | BlockingIOError):
                raise StateError(f"the network {self.name!r} does not answer: it is busy, or halted") from None
            if isinstance(error, OSError):
                raise PortError(error.errno, f"cannot connect to {self.path}: {error.strerror}") from error
            raise
        return connection

    @staticmethod
    def _send(connection: socket.socket, line: bytes, descriptors: Sequence[int] = ()) -> None:
        try:
            sent = socket.send_fds(connection, [line], list(descriptors)) if descriptors else 0
            connection.sendall(line[sent:])
        except TimeoutError:
            raise StateError("the network does not take what it is asked: it is busy, or halted") from None
        except OSError:
            return  # it was refused before it was whole: the answer says why

    @staticmethod
    def _planned(said: Any) -> Plan:
        if not isinstance(said, list) or len(said) != 2:  # noqa: PLR2004 - before and after
            raise PeerError(f"two descriptions were expected, found {said!r}")
        return Plan(Spec.from_dict(said[0]), Spec.from_dict(said[1]))


def _open_here(to: Target, *, overwrite: bool) -> tuple[int, Path | None]:
    """A descriptor of what is to be written to, which is the caller's; and the file, if it was made for that."""
    if not isinstance(to, str | os.PathLike) or str(to) == "-":
        opened = open_target(to)
        descriptor, opened.descriptor = opened.descriptor, None
        return cast("int", descriptor), None
    path = Path(to)
    is_new = not path.exists()
    only_new = os.O_EXCL if is_new or (path.is_file() and not overwrite) else 0
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | only_new, 0o666), path if is_new else None
    except FileExistsError:
        raise ConfigError(f"{path} exists already: choose another name, or say overwrite to write over it") from None
    except OSError as error:
        raise PortError(error.errno, f"cannot write the capture {path}: {error.strerror}") from error


def _named(place: Place) -> list[str]:
    """The names of the nodes at a place."""
    return [end if isinstance(end, str) else end.name for end in (place if isinstance(place, tuple) else (place,))]


def to_numbers(value: Any) -> Any:
    """The same with bytes as lists of numbers, as JSON has them."""
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, dict):
        return {name: to_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_numbers(inner) for inner in value]
    return value
