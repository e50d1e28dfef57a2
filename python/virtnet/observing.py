"""Looking at a network while it runs: the captures of :class:`~virtnet.Net`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, cast, overload

from virtnet import _virtnet
from virtnet.capturing import Capture, ColumnsCapture, PlannedCapture, check_room, open_target
from virtnet.description import FunctionSpec, whole
from virtnet.kinds import FRAME_MAX
from virtnet.nodes import Function, Node, PortNode
from virtnet.plans import PlannedNode, Plans, planned
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from virtnet.capturing import Target
    from virtnet.net import Net

__all__ = ["Observing"]


class Observing:
    """The part of :class:`~virtnet.Net` that looks. It stands on the part that describes, which is made of it."""

    _plan: Plans

    if TYPE_CHECKING:

        def change(self) -> AbstractContextManager[object]:
            """Made by the part that describes, and so are the others here."""

        def _cable_at(self, where: Node | tuple[Node, Node]) -> tuple[Node, Node]: ...
        def _name(self, given: str | None, base: str) -> str: ...
        def _check_name(self, name: str) -> None: ...

    @overload
    def capture(
        self,
        where: Node | tuple[Node, Node],
        to: None = None,
        *,
        filter: str = "",
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
        name: str | None = None,
    ) -> ColumnsCapture: ...
    @overload
    def capture(
        self,
        where: Node | tuple[Node, Node],
        to: Target,
        *,
        filter: str = "",
        overwrite: bool = False,
        pcap: bool = False,
        name: str | None = None,
    ) -> Capture: ...
    def capture(
        self,
        where: Node | tuple[Node, Node],
        to: Target | None = None,
        *,
        filter: str = "",  # noqa: A002 - what everybody calls it
        overwrite: bool = False,
        pcap: bool = False,
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
        name: str | None = None,
    ) -> Capture:
        """Writes down what passes a place of the network, in both directions, until it is stopped.

        Args:
            where: a node with one cable, or the two nodes at the ends of a cable.
            to: a file, pcapng unless it ends in ``.pcap``; or somebody who reads it live: a FIFO, ``-`` for standard
                output, an open file or descriptor. A reader that does not keep up costs packets, which are counted, and
                one that leaves ends the capture. Nothing: into memory, to be read as columns.
            filter: which packets, in the language of tcpdump (``"arp or udp port 53"``); all if empty.
            overwrite: write over a file that exists.
            pcap: write pcap instead of pcapng, whatever the file is called.
            snap: of a capture into memory, how many bytes of each packet are kept.
            memory: of the same, bytes that hold what was not read yet; what comes when they are full is dropped.
            name: what to call the port that writes.

        Returns:
            A :class:`~virtnet.Capture`; a :class:`~virtnet.ColumnsCapture` for one into memory.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     vm1, vm2 = net.memory("vm1"), net.memory("vm2")
            ...     _ = vm1 >> net.switch() << vm2
            ...     with net.capture(vm1, "/tmp/virtnet-doc.pcapng", overwrite=True) as capture:
            ...         _ = vm1.end.tx([bytes(60)])
            ...         while not capture.packets:
            ...             pass

        Raises:
            ConfigError: there is no such place, no such filter, or the file exists.
            PortError: the file cannot be written.
        """
        check_room(snap, memory)
        opened = None if to is None else open_target(to)
        net = cast("Net", self)
        with ExitStack() as failing, self.change():
            if opened is not None:
                failing.callback(opened.close)
            a, b = self._cable_at(where)
            place = where.name if isinstance(where, Node) else f"{a.name}-{b.name}"
            called = self._name(name, f"capture-{place}" if opened is None else opened.name)
            self._check_name(called)
            recorder = _virtnet.Recorder(snap, memory)
            if opened is None:
                spec = PortSpec.of("memory", called)
                file = PlannedNode(PortNode(net, called, spec), spec, {"recorder": recorder}, kind="columns")
            else:
                spec = PortSpec.of("pcap", opened.where if opened.descriptor is None else "-", overwrite=overwrite)
                described = {"interface": place, "filter": filter, "append": opened.append, "pcap": pcap}
                options = {**spec.options, "where": opened.where, **described}
                file = PlannedNode(PortNode(net, called, spec), spec, options)
            tee_spec = whole(FunctionSpec("tee", {"branch": called, "filter": filter}))
            tee = planned(Function(net, self._name(None, f"tee-{called}"), tee_spec), tee_spec)
            handles = cast("PortNode", file.handle), cast("Function", tee.handle)
            made = ColumnsCapture(net, *handles, recorder) if opened is None else Capture(net, *handles, opened)
            capture = PlannedCapture(made, (a.name, b.name), file, tee)
            self._plan = replace(self._plan, captures=(*self._plan.captures, capture))
            failing.pop_all()
        self._captures_opened()
        return made

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures that there are."""
        return tuple(capture.handle for capture in self._plan.captures)

    def _end_capture(self, capture: Capture) -> None:
        with self.change():
            left = tuple(other for other in self._plan.captures if other.handle is not capture)
            if len(left) < len(self._plan.captures):
                self._plan = replace(self._plan, captures=left)

    def _captures_opened(self) -> None:
        """Said when what captures write to may be open."""
