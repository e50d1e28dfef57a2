"""Looking at a network while it runs: the captures of :class:`~virtnet.Net`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, cast, overload

from virtnet import _virtnet
from virtnet.capturing import (
    Capture,
    ColumnsCapture,
    PlannedCapture,
    PlannedPlace,
    check_room,
    filters_of,
    open_target,
    place_name,
    places_of,
)
from virtnet.description import FunctionSpec, whole
from virtnet.errors import ConfigError
from virtnet.kinds import FRAME_MAX
from virtnet.nodes import Function, Node, PortNode
from virtnet.plans import PlannedNode, Plans, planned
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from virtnet.capturing import Place, Target
    from virtnet.net import Net

__all__ = ["Observing"]


class Observing:
    """The part of :class:`~virtnet.Net` that looks. It stands on the part that describes, which is made of it."""

    _plan: Plans

    if TYPE_CHECKING:

        def change(self) -> AbstractContextManager[object]:
            """Made by the part that describes, and so are the others here."""

        def _cable_at(self, where: Node | tuple[Node, Node]) -> tuple[Node, Node]: ...
        def __getitem__(self, name: str) -> Node:
            """Likewise."""

        def _name(self, given: str | None, base: str, besides: Sequence[str] = ()) -> str: ...
        def _check_name(self, name: str) -> None: ...

    @overload
    def capture(
        self,
        where: Place | list[Place],
        to: None = None,
        *,
        filter: str | Sequence[str] = "",
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
        name: str | None = None,
    ) -> ColumnsCapture: ...
    @overload
    def capture(
        self,
        where: Place | list[Place],
        to: Target,
        *,
        filter: str | Sequence[str] = "",
        overwrite: bool = False,
        pcap: bool = False,
        name: str | None = None,
    ) -> Capture: ...
    def capture(
        self,
        where: Place | list[Place],
        to: Target | None = None,
        *,
        filter: str | Sequence[str] = "",  # noqa: A002 - what everybody calls it
        overwrite: bool = False,
        pcap: bool = False,
        snap: int = FRAME_MAX,
        memory: int = 64 << 20,
        name: str | None = None,
    ) -> Capture:
        """Writes down what passes a place of the network, or several, in both directions, until it is stopped.

        Each packet says which way it was going, as ``tcpdump`` on a host sees a guest's tap: what comes from the node
        into the network is inbound, and what goes to it outbound. Of the two nodes at a cable the first one counts.

        Args:
            where: a node with one cable, or the two nodes at the ends of a cable, or their names; or a list of such
                places, each of which is an interface of the pcapng file, with counts of its own at its end. A place
                that goes leaves the others; the last one ends the capture.
            to: a file, pcapng unless it ends in ``.pcap``; or somebody who reads it live: a FIFO, ``-`` for standard
                output, an open file or descriptor. A reader that does not keep up costs packets, which are counted, and
                one that leaves ends the capture. Nothing: into memory, to be read as columns.
            filter: which packets, in the language of tcpdump (``"arp or udp port 53"``); all if empty. One for all
                places, or one for each.
            overwrite: write over a file that exists.
            pcap: write pcap instead of pcapng, whatever the file is called. It knows one place and no directions.
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
            ...     with net.capture([vm1, vm2], "/tmp/virtnet-doc.pcapng", overwrite=True) as capture:
            ...         _ = vm1.end.tx([bytes(60)])
            ...         while capture.packets < 2:
            ...             pass

        Raises:
            ConfigError: there is no such place, no such filter, a place is named twice, the file exists, or it is
                pcap and there are several places.
            PortError: the file cannot be written.

        Source:
            draft-ietf-opsawg-pcapng, section 4.3.1 (``epb_flags``).
        """
        check_room(snap, memory)
        places = places_of(where)
        filters = filters_of(filter, len(places))
        if len(places) > 1 and to is not None and (pcap or str(to).lower().endswith(".pcap")):
            raise ConfigError("a pcap file does not say at which of several places a packet was captured: write pcapng")
        opened = None if to is None else open_target(to)
        net = cast("Net", self)
        with ExitStack() as failing, self.change():
            if opened is not None:
                failing.callback(opened.close)
            cables = self._cables_of_places(places)
            names = [place_name(place) for place in places]
            called = self._name(name, f"capture-{'-'.join(names)}" if opened is None else opened.name)
            self._check_name(called)
            tees = self._tees(called, filters)
            gates = {tee.handle.name: gate for gate, tee in enumerate(tees)}
            recorder = _virtnet.Recorder(len(places), snap, memory)
            if opened is None:
                spec = PortSpec.of("memory", called)
                options = {"recorder": recorder, "gates": gates}
                file = PlannedNode(PortNode(net, called, spec), spec, options, kind="columns")
            else:
                spec = PortSpec.of("pcap", opened.where if opened.descriptor is None else "-", overwrite=overwrite)
                described = {"places": list(zip(names, filters, strict=True)), "append": opened.append, "pcap": pcap}
                options = {**spec.options, "where": opened.where, "gates": gates, **described}
                file = PlannedNode(PortNode(net, called, spec), spec, options)
            handles = cast("PortNode", file.handle), names, [cast("Function", tee.handle) for tee in tees]
            made = ColumnsCapture(net, *handles, recorder) if opened is None else Capture(net, *handles, opened)
            planned_places = tuple(PlannedPlace(*one) for one in zip(cables, tees, strict=True))
            capture = PlannedCapture(made, file, planned_places)
            self._plan = replace(self._plan, captures=(*self._plan.captures, capture))
            failing.pop_all()
        self._captures_opened()
        return made

    def _cables_of_places(self, places: Sequence[Place]) -> list[tuple[str, str]]:
        """The ends of the cable at each place, those first that say what is inbound."""
        found: dict[frozenset[str], str] = {}
        cables = []
        for place in places:
            said = place if isinstance(place, tuple) else (place,)
            ends = [self[end] if isinstance(end, str) else end for end in said]
            if len(ends) not in {1, 2}:
                raise ConfigError(f"a place is a node, or the two at the ends of a cable, found {len(ends)} nodes")
            a, b = self._cable_at(ends[0] if len(ends) == 1 else (ends[0], ends[1]))
            cable, called = frozenset({a.name, b.name}), place_name(place)
            if cable in found:
                raise ConfigError(
                    f"{found[cable]!r} and {called!r} are the same cable, and a capture has each place once: "
                    "leave one out, or take two captures"
                )
            found[cable] = called
            cables.append((a.name, b.name))
        return cables

    def _tees(self, called: str, filters: Sequence[str]) -> list[PlannedNode]:
        """The functions that copy what is captured into the port of that name."""
        tees: list[PlannedNode] = []
        for chosen in filters:
            spec = whole(FunctionSpec("tee", {"branch": called, "filter": chosen}))
            name = self._name(None, f"tee-{called}", [tee.handle.name for tee in tees])
            tees.append(planned(Function(cast("Net", self), name, spec), spec))
        return tees

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
