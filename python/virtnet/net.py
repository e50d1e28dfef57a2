"""Networks: describe, run, change while they run.

::

    with Net() as net:
        vm1 = net.vhost_user("vm1.sock")
        vm2 = net.vhost_user("vm2.sock", queue_pairs=2)
        switch = net.switch(ageing_s=300)
        vm1 >> switch << vm2
        print(vm1.qemu_args())
        net.serve()

A network is nodes (ports and functions) by name and cables between them. ``a >> b`` and ``b << a`` plug in the same
cable, which carries packets both ways; ``>>`` gives back its right side and ``<<`` its left, so chains read as they
are cabled.

Before :meth:`Net.start` a network is only described, and nothing is opened. While it runs, each change takes effect
when it is made, whole or not at all: a port that cannot be opened raises where it was asked for, and everybody else
loses no packet. Changes that belong together go into a ``with net.change():`` block.
"""

from __future__ import annotations

import html
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsBytes

from virtnet import _virtnet
from virtnet.description import CABLES, FRAME_MAX, NAME_MAX, SOURCE_PACKETS_MAX, FunctionSpec, Plan, Poll, Spec, whole
from virtnet.errors import ConfigError, StateError
from virtnet.filters import compile_filter
from virtnet.nodes import Capture, Function, Node, PortNode
from virtnet.ports import MemoryPort
from virtnet.spec import PortSpec
from virtnet.stats import Balance, FunctionStats, NetStats, PortStats, WorkerStats

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from virtnet.burst import Burst, Frame
    from virtnet.ports import Features

__all__ = ["Net"]

POLLS: tuple[Poll, ...] = ("adaptive", "busy", "interrupt")

#: A signal that another thread caught, and an end elsewhere, are noticed after this long.
WAIT_SLICE_S = 0.1

#: The shortest frame that Ethernet carries, without its checksum.
FRAME_MIN = 60
ETHERNET_LEN = 14

#: The offload metadata of a packet with nothing left to do.
PLAIN = bytes(10)


@dataclass(frozen=True)
class _Node:
    """One node of the description, and what a program holds of it."""

    handle: PortNode | Function
    spec: PortSpec | FunctionSpec
    #: As the engine takes them.
    options: dict[str, Any]
    #: Of a memory port, the other end.
    end: MemoryPort | None = None


@dataclass(frozen=True)
class _Plan:
    """A network's description: immutable, so that a change that fails leaves it as it was."""

    nodes: dict[str, _Node] = field(default_factory=dict)
    cables: tuple[tuple[str, str], ...] = ()

    def waits(self, name: str) -> bool:
        """Whether a node is left out until it is plugged in: a capture would be over before anybody hears it."""
        node = self.nodes[name]
        return node.handle.kind == "pcap" and node.options["mode"] == "read" and not self.cables_of(name)

    def cables_of(self, name: str) -> list[str]:
        """Who is at the other ends of a node's cables."""
        return [b if a == name else a for a, b in self.cables if name in {a, b}]

    def without(self, names: set[str]) -> _Plan:
        """The same without some nodes and their cables."""
        nodes = {name: node for name, node in self.nodes.items() if name not in names}
        return _Plan(nodes, tuple(cable for cable in self.cables if names.isdisjoint(cable)))

    def described(self) -> tuple[list[tuple[str, str, dict[str, Any]]], tuple[tuple[str, str], ...]]:
        """Nodes and cables as the engine takes them."""
        nodes = [(name, node.handle.kind, node.options) for name, node in self.nodes.items() if not self.waits(name)]
        return nodes, self.cables


class Net:
    """A network of ports and functions.

    Args:
        cpus: the processors its workers are pinned to, one worker each; none means one worker, anywhere. The queue
            pairs of a vhost-user port are spread over the workers, and so are ports of one queue pair.
        poll: what workers do when there is nothing to do: ``adaptive`` looks again while traffic flows and sleeps when
            it stops, ``busy`` never sleeps, ``interrupt`` always does.
    """

    def __init__(self, *, cpus: Sequence[int] = (), poll: Poll = "adaptive") -> None:
        """Begins a description; nothing is opened."""
        if poll not in POLLS:
            raise ConfigError(f"poll is adaptive, busy or interrupt, found {poll!r}")
        self._cpus = [_cpu(number) for number in cpus]
        self._poll: Poll = poll
        self._lock = threading.RLock()
        self._plan = _Plan()
        self._engine: _virtnet.Engine | None = None
        self._before_change: _Plan | None = None
        #: What the network was before each change that can be taken back.
        self._history: list[Spec] = []
        self._last = NetStats()
        #: What had happened at each port when the network was stopped.
        self._last_events: dict[str, tuple[list[dict[str, Any]], int]] = {}
        #: Not an event: its lock could be held by what a signal interrupts.
        self._ended = False

    # Ports.

    def port(self, spec: str | PortSpec, *, name: str | None = None) -> PortNode:
        """Adds a port of any kind, by its textual form or specification.

        Args:
            spec: such as ``"vhost-user:vm1.sock,queue_pairs=2"``.
            name: what to call it; made from what it is if not given.

        Raises:
            ConfigError: the text is no port, or the name is taken.
            PortError: the network runs and the system refused.
        """
        if isinstance(spec, str):
            spec = PortSpec.parse(spec)
        handle = PortNode(self, self._name(name, Path(spec.where).stem or spec.kind), spec)
        self._add(_node(handle, spec))
        return handle

    def vhost_user(
        self,
        path: str | os.PathLike[str],
        *,
        client: bool = False,
        queue_pairs: int = 1,
        mtu: int | None = None,
        mac: str | None = None,
        speed_mbps: int | None = None,
        postcopy: bool = False,
        in_band: bool = False,
        without: Features | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds a network device that a driver attaches to; options as for :class:`~virtnet.VhostUserPort`."""
        options = {
            "client": client,
            "queue_pairs": queue_pairs,
            "mtu": mtu,
            "mac": mac,
            "speed_mbps": speed_mbps,
            "postcopy": postcopy,
            "in_band": in_band,
            "without": without,
        }
        return self.port(PortSpec.of("vhost-user", str(path), **options), name=name)

    def virtio_user(
        self,
        path: str | os.PathLike[str],
        *,
        server: bool = False,
        queue_pairs: int = 1,
        queue_size: int = 256,
        ring: Literal["split", "packed"] = "split",
        in_order: bool = True,
        without: Features | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds a driver that attaches to a vhost-user back-end; options as for :class:`~virtnet.VirtioUserPort`."""
        options = {
            "server": server,
            "queue_pairs": queue_pairs,
            "queue_size": queue_size,
            "ring": ring,
            "in_order": in_order,
            "without": without,
        }
        return self.port(PortSpec.of("virtio-user", str(path), **options), name=name)

    def tap(self, interface: str, *, mtu: int | None = None, name: str | None = None) -> PortNode:
        """Adds an interface of the kernel; options as for :class:`~virtnet.TapPort`."""
        return self.port(PortSpec.of("tap", interface, mtu=mtu), name=name)

    def af_packet(self, interface: str, *, promiscuous: bool = True, name: str | None = None) -> PortNode:
        """Adds an interface of the host that is there already; options as for :class:`~virtnet.AfPacketPort`."""
        return self.port(PortSpec.of("af-packet", interface, promiscuous=promiscuous), name=name)

    def pcap(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Literal["write", "read"] = "write",
        overwrite: bool = False,
        loop: bool = False,
        timed: bool = False,
        name: str | None = None,
    ) -> PortNode:
        """Adds a capture file; options as for :class:`~virtnet.PcapPort`. It is read from when it is plugged in."""
        spec = PortSpec.of("pcap", str(path), mode=mode, overwrite=overwrite, loop=loop, timed=timed)
        return self.port(spec, name=name)

    def memory(self, name: str, *, capacity: int = 1024) -> PortNode:
        """Adds a port whose other end, ``.end``, is a :class:`~virtnet.MemoryPort` for this program to use by hand."""
        return self.port(PortSpec.of("memory", name, capacity=capacity), name=name)

    # Functions.

    def switch(self, *, ageing_s: float = 300.0, name: str | None = None) -> Function:
        """Adds a switch, which learns who is behind which cable and floods what is for nobody it knows.

        Args:
            ageing_s: seconds after which a station that was not heard of is forgotten.
            name: what to call it.
        """
        if not 0 < ageing_s < float("inf"):
            raise ConfigError(f"ageing_s is a number of seconds above 0, found {ageing_s!r}")
        return self._function(name, FunctionSpec("switch", {"ageing_s": float(ageing_s)}))

    def wire(self, a: Node | None = None, b: Node | None = None, *, name: str | None = None) -> Function:
        """Adds a wire, which hands what comes in at one end out at the other, and plugs in the nodes given."""
        with self.change():
            wire = self._function(name, FunctionSpec("wire"))
            for node in (a, b):
                if node is not None:
                    self.cable(node, wire)
        return wire

    def tee(self, branch: Node, *, filter: str = "", name: str | None = None) -> Function:  # noqa: A002
        """Adds a tee: a wire between two other nodes that copies what passes, either way, to ``branch``.

        Args:
            branch: who gets the copies, by a cable that is plugged in here. What it sends ends at the tee.
            filter: which packets are copied, in the language of tcpdump (``"tcp port 80"``); all if empty.
            name: what to call it.

        Raises:
            ConfigError: it is no filter, or there is no libpcap to compile it.
        """
        with self.change():
            self._known(branch.name)
            tee = self._function(name, FunctionSpec("tee", {"branch": branch.name, "filter": filter}))
            self.cable(branch, tee)
        return tee

    def capture(
        self,
        where: Node | tuple[Node, Node],
        path: str | os.PathLike[str],
        *,
        filter: str = "",  # noqa: A002 - what everybody calls it
        overwrite: bool = False,
        name: str | None = None,
    ) -> Capture:
        """Writes what passes a place of the network, in both directions, to a file until it is stopped.

        Args:
            where: a node with one cable, or the two nodes at the ends of a cable.
            path: the file, pcapng unless it ends in ``.pcap``.
            filter: which packets, in the language of tcpdump (``"arp or udp port 53"``); all if empty.
            overwrite: write over a file that exists.
            name: what to call the file's port.

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
        with self.change():
            a, b = self._cable_at(where)
            file = self.pcap(path, overwrite=overwrite, name=self._name(name, f"capture-{Path(path).stem}"))
            self.unplug(a, b)
            tee = self.tee(file, filter=filter, name=self._name(None, f"tee-{file.name}"))
            self.cable(a, tee)
            self.cable(tee, b)
        return Capture(file, tee)

    def _cable_at(self, where: Node | tuple[Node, Node]) -> tuple[Node, Node]:
        """The ends of the cable that is meant."""
        if isinstance(where, Node):
            others = self._plan.cables_of(self._known(where.name).handle.name)
            if len(others) != 1:
                raise ConfigError(
                    f"{where.name!r} has {len(others)} cables: say which one by the nodes at its ends, (a, b)"
                )
            return where, self[others[0]]
        a, b = where
        if b.name not in self._plan.cables_of(self._known(a.name).handle.name):
            raise ConfigError(f"there is no cable between {a.name!r} and {b.name!r}")
        return a, b

    def sink(self, *, copy: bool = False, name: str | None = None) -> Function:
        """Adds a sink, which takes all packets and counts them.

        Args:
            copy: copy whole packets out of their senders' memory first, as a program that keeps them would.
            name: what to call it.
        """
        return self._function(name, FunctionSpec("sink", {"copy": bool(copy)}))

    def source(
        self,
        frame: Frame | Iterable[Frame] | Burst | None = None,
        *,
        size: int | None = None,
        rate_pps: float | None = None,
        count: int | None = None,
        name: str | None = None,
    ) -> Function:
        """Adds a source, which makes the same packet again and again, or the same few in turn.

        What arrives at it ends there and is counted as consumed.

        Args:
            frame: the packet; a broadcast UDP datagram to port 9 (discard) if not given. Or 1 to 64 packets that take
                turns; those of a :class:`~virtnet.Burst` keep their offload metadata.
            size: bytes of each, without Ethernet's checksum; frames are cut or filled up with zeros.
            rate_pps: packets a second, as many as its port takes if not given.
            count: how many packets in all, without end if not given.
            name: what to call it.
        """
        if rate_pps is not None and not 0 < rate_pps < float("inf"):
            raise ConfigError(f"rate_pps is a number above 0, or None for no limit, found {rate_pps!r}")
        if count is not None and count < 0:
            raise ConfigError(f"count is a number from 0, or None for no end, found {count!r}")
        if size is not None and not ETHERNET_LEN <= size <= FRAME_MAX:
            raise ConfigError(f"a frame has {ETHERNET_LEN} to {FRAME_MAX} bytes, found {size}")
        options: dict[str, Any] = {
            "rate_pps": None if rate_pps is None else float(rate_pps),
            "count": count,
            "size": size,
        }
        if frame is not None:
            options["frames"] = frames = []
            for packet, offload in _packets(frame):
                if not ETHERNET_LEN <= len(packet if size is None else packet[:size].ljust(size)) <= FRAME_MAX:
                    raise ConfigError(f"a frame has {ETHERNET_LEN} to {FRAME_MAX} bytes, found {len(packet)}")
                frames.append(packet.hex() + (f"/{offload.hex()}" if offload != PLAIN else ""))
            if not 1 <= len(frames) <= SOURCE_PACKETS_MAX:
                raise ConfigError(f"a source makes copies of 1 to {SOURCE_PACKETS_MAX} packets, found {len(frames)}")
        return self._function(name, FunctionSpec("source", options))

    def echo(self, *, name: str | None = None) -> Function:
        """Adds an echo, which swaps the MAC addresses of every packet and sends it back."""
        return self._function(name, FunctionSpec("echo"))

    # Cables and changes.

    def cable(self, a: Node, b: Node) -> None:
        """Plugs a cable between two nodes, as ``a >> b`` does. Between two ports it is a wire of its own.

        Raises:
            ConfigError: a node is of another network, or has no free end for a cable.
        """
        with self.change():
            for node in (a, b):
                if node.net is not self:
                    raise ConfigError(f"a cable joins nodes of one network, {node.name!r} belongs to another")
                self._known(node.name)
            if a.name == b.name:
                raise ConfigError(f"a cable joins two nodes, found {a.name!r} at both ends")
            if isinstance(a, PortNode) and isinstance(b, PortNode):
                self.wire(a, b, name=f"{a.name}-{b.name}")
                return
            if a.name in self._plan.cables_of(b.name):
                raise ConfigError(f"{a.name!r} and {b.name!r} are joined already")
            for node in (a, b):
                most, words = CABLES.get(node.kind, (1, "one"))
                plugged = self._plan.cables_of(node.name)
                if len(plugged) >= most:
                    raise ConfigError(
                        f"a {node.kind} takes {words} cable{'s' if most > 1 else ''}, and {node.name!r} is joined to "
                        f"{' and '.join(map(repr, plugged))} already: put a switch between, or unplug it first"
                    )
            self._plan = replace(self._plan, cables=(*self._plan.cables, (a.name, b.name)))

    def unplug(self, a: Node, b: Node) -> None:
        """Takes the cable between two nodes away.

        Raises:
            ConfigError: there is none.
        """
        with self.change():
            ends = {a.name, b.name}
            cables = tuple(cable for cable in self._plan.cables if set(cable) != ends)
            if len(cables) == len(self._plan.cables):
                raise ConfigError(f"there is no cable between {a.name!r} and {b.name!r}")
            self._plan = replace(self._plan, cables=cables)

    def remove(self, node: Node | str) -> None:
        """Takes a node and its cables away; a port is closed. Its packets stay in the balance of :meth:`stats`.

        Raises:
            ConfigError: there is no such node.
        """
        name = node if isinstance(node, str) else node.name
        with self.change():
            self._known(name)
            nodes = {other: node for other, node in self._plan.nodes.items() if other != name}
            cables = tuple(cable for cable in self._plan.cables if name not in cable)
            self._plan = _Plan(nodes, cables)

    @contextmanager
    def change(self) -> Iterator[Self]:
        """Makes what is done in the block one change: it takes effect at the end, whole or not at all.

        Raises:
            VirtnetError: it cannot be done; the network is and runs as before.
        """
        with self._lock:
            if self._before_change is not None:
                yield self  # part of a larger change
                return
            self._before_change = before = self._plan
            try:
                yield self
                if self._engine is not None and self._plan != before:
                    self._apply(self._engine, before)
            except BaseException:
                self._plan = before
                raise
            finally:
                self._before_change = None

    # The network as a value.

    @property
    def spec(self) -> Spec:
        """What the network is described as now."""
        with self._lock:
            nodes = self._plan.nodes
            return Spec(
                {name: node.spec for name, node in nodes.items() if isinstance(node.spec, PortSpec)},
                {name: node.spec for name, node in nodes.items() if isinstance(node.spec, FunctionSpec)},
                frozenset(self._plan.cables),
                tuple(self._cpus),
                self._poll,
            )

    @classmethod
    def of(cls, spec: Spec) -> Net:
        """A network as specified; nothing is opened before :meth:`start`."""
        net = cls(cpus=spec.cpus, poll=spec.poll)
        net.apply(spec)
        return net

    def plan(self, spec: Spec) -> Plan:
        """What :meth:`apply` would do; nothing is done."""
        return Plan(self.spec, spec)

    def apply(self, spec: Spec) -> Plan:
        """Makes the network what a specification says, wholly or not at all, and returns what that changed.

        What stays as it is keeps its sessions, tables and counters, and loses no packet. Handles of ports and functions
        that keep their name and kind stay good.

        Raises:
            ConfigError: a running network cannot get other workers; the caller's fault.
            PortError: the system refused a port; the network is and runs as before.
        """
        with self._lock:
            before = self.spec
            if self._engine is not None and (spec.cpus, spec.poll) != (before.cpus, before.poll):
                raise ConfigError("net: cpus and poll are those of the workers and stay while the network runs")
            with self.change():
                self._plan = self._planned(spec)
            self._cpus, self._poll = list(spec.cpus), spec.poll
            for node in self._plan.nodes.values():
                node.handle.spec = node.spec
                if isinstance(node.handle, PortNode):
                    node.handle.end = node.end
            if before != spec:
                self._history.append(before)
            return Plan(before, spec)

    def rollback(self) -> Plan:
        """Takes back the last :meth:`apply` that was not taken back yet, and returns what that changed.

        Raises:
            StateError: there is none.
            PortError: as for :meth:`apply`.
        """
        with self._lock:
            if not self._history:
                raise StateError("nothing was applied that could be taken back")
            plan = self.apply(self._history[-1])
            del self._history[-2 if plan else -1 :]
            return plan

    # Life.

    def start(self) -> Self:
        """Opens the ports and starts the workers. A network that was stopped starts afresh, with counters at 0.

        Raises:
            StateError: it runs already.
            PortError: the system refused a port; nothing runs, nothing is open.
        """
        with self._lock:
            if self._engine is not None:
                raise StateError("the network runs already")
            engine = _virtnet.Engine(self._cpus, self._poll)
            try:
                self._apply(engine, _Plan())
            except BaseException:
                engine.stop()
                raise
            self._ended = False
            self._engine = engine
            self._last_events = {}
        return self

    def stop(self) -> None:
        """Stops the workers and closes the ports. The last counters stay readable; again does nothing."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.stop()
                self._last = _snapshot(engine.stats())
                ports = (name for name, node in self._plan.nodes.items() if isinstance(node.spec, PortSpec))
                self._last_events = {name: engine.events(name, 0) for name in ports}
            self._ended = True

    def serve(self, seconds: float | None = None) -> None:
        """Runs until Ctrl-C, until :meth:`stop` is called elsewhere, or for a time; starts what is not started.

        When the time is over or Ctrl-C was pressed, the network stops. In the main thread a request to end
        (SIGTERM) does the same.
        """
        if not self.running:
            self.start()
        with self._ended_by_sigterm():
            try:
                self.wait(seconds)
            except KeyboardInterrupt:
                pass
            finally:
                self.stop()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the network is stopped elsewhere; whether that happened within the time given."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._ended:
            left = WAIT_SLICE_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, WAIT_SLICE_S))
        return True

    def _set_link(self, port: PortNode, up: bool) -> None:
        with self._lock:
            if self._engine is None or port.name not in self:
                raise StateError(
                    f"the link of {port.name!r} cannot be taken {'up' if up else 'down'}: it is {port.state}"
                )
            self._engine.set_link(port.name, up)

    @property
    def running(self) -> bool:
        """Whether it is started."""
        return self._engine is not None

    def _events(self, port: str, first: int) -> tuple[list[dict[str, Any]], int]:
        """What has happened at a port from event number ``first`` on, and how many events were lost."""
        with self._lock:
            if self._engine is not None:
                return self._engine.events(port, first)
            events, dropped = self._last_events.get(port, ([], 0))
            return [event for event in events if event["number"] >= first], dropped

    def _rings(self, port: str) -> list[dict[str, Any]]:
        """How the rings of a port stand."""
        with self._lock:
            return self._engine.rings(port) if self._engine is not None else []

    def stats(self) -> NetStats:
        """The counters now; of a network that was stopped, those at its end."""
        with self._lock:
            return _snapshot(self._engine.stats()) if self._engine is not None else self._last

    def __enter__(self) -> Self:
        """Starts it; the end of the block stops it."""
        return self.start()

    def __exit__(self, *exc: object) -> None:
        """Stops it."""
        self.stop()

    # Looking at it.

    @property
    def cables(self) -> tuple[tuple[str, str], ...]:
        """The cables, as pairs of names."""
        return self._plan.cables

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        with self._lock:
            return self._known(name).handle

    def __contains__(self, name: object) -> bool:
        """Whether there is a node of that name."""
        return name in self._plan.nodes

    def __iter__(self) -> Iterator[Node]:
        """The nodes, in the order they were added."""
        return iter([node.handle for node in self._plan.nodes.values()])

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._plan.nodes)

    def __repr__(self) -> str:
        """What it is made of and whether it runs."""
        state = "running" if self.running else "not running"
        plan = self._plan
        ports = sum(isinstance(node.handle, PortNode) for node in plan.nodes.values())
        return f"<Net {state}: {ports} ports, {len(plan.nodes) - ports} functions, {len(plan.cables)} cables>"

    def _repr_html_(self) -> str:
        """A table of the ports, for notebooks."""
        stats = self.stats()
        heads = ["port", "", "state", "received", "sent", "dropped"]
        rows = [
            [node.name, str(node.spec), node.state, port.received, port.sent, sum(port.drops.values())]
            for node in self
            if isinstance(node, PortNode)
            for port in [stats.ports.get(node.name, PortStats())]
        ]
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{_html_table(heads, rows)}"

    # Inside.

    @contextmanager
    def _ended_by_sigterm(self) -> Iterator[None]:
        """While the block runs, SIGTERM ends the network; only the main thread may arrange that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(_number: int, _frame: object) -> None:
            self._ended = True

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _name(self, given: str | None, base: str) -> str:
        """The name given, or one made from ``base`` that is free."""
        if given is not None:
            return given
        base = base[: NAME_MAX - 8]
        names = [base, *(f"{base}-{i}" for i in range(2, len(self._plan.nodes) + 3))]
        return next(name for name in names if name not in self._plan.nodes)

    def _function(self, name: str | None, spec: FunctionSpec) -> Function:
        spec = whole(spec)
        handle = Function(self, self._name(name, spec.kind), spec)
        self._add(_node(handle, spec))
        return handle

    def _add(self, node: _Node) -> None:
        name = node.handle.name
        with self.change():
            if not name or len(name) > NAME_MAX or not name.isprintable():
                raise ConfigError(f"a name has 1 to {NAME_MAX} printable characters, found {name!r}")
            if name in self._plan.nodes:
                taken = self._plan.nodes[name].handle
                raise ConfigError(f"the name {name!r} is taken by a {taken.kind}: give another with name=")
            self._plan = replace(self._plan, nodes={**self._plan.nodes, name: node})

    def _known(self, name: str) -> _Node:
        if name not in self._plan.nodes:
            there = ", ".join(self._plan.nodes) or "nothing yet"
            raise ConfigError(f"there is no node {name!r} in the network: there is {there}")
        return self._plan.nodes[name]

    def _planned(self, spec: Spec) -> _Plan:
        """The description that a specification means, with the handles of the nodes that keep their kind."""
        nodes = {}
        described: list[tuple[str, PortSpec | FunctionSpec]] = [*spec.ports.items(), *spec.functions.items()]
        for name, wanted in described:
            node = self._plan.nodes.get(name)
            if node is None or node.handle.kind != wanted.kind:
                handle: PortNode | Function
                handle = PortNode(self, name, wanted) if isinstance(wanted, PortSpec) else Function(self, name, wanted)
                node = _node(handle, wanted)
            elif node.spec != wanted:
                node = _node(node.handle, wanted)
            nodes[name] = node
        kept = [cable for cable in self._plan.cables if (min(cable), max(cable)) in spec.cables]
        new = spec.cables - {(min(cable), max(cable)) for cable in kept}
        return _Plan(nodes, (*kept, *sorted(new)))

    def _apply(self, engine: _virtnet.Engine, before: _Plan) -> None:
        """Makes the engine run the description instead of the one before: wholly, or not at all."""
        after = self._plan
        gone = {
            name: node.options["where"]
            for name, node in before.nodes.items()
            if isinstance(node.spec, PortSpec) and node.spec.kind != "memory" and node != after.nodes.get(name)
        }
        wanted = {node.options.get("where") for name, node in after.nodes.items() if node != before.nodes.get(name)}
        # What is closed to be opened anew must be let go of first; whoever needs nothing of it goes on.
        freed = {name for name, where in gone.items() if where in wanted}
        if not freed:
            engine.apply(*after.described())
            return
        engine.apply(*before.without(freed).described())
        try:
            engine.apply(*after.described())
        except BaseException:
            engine.apply(*before.described())
            raise


def _node(handle: PortNode | Function, spec: PortSpec | FunctionSpec) -> _Node:
    """A node of a description, with what the engine needs to make it."""
    if isinstance(spec, PortSpec):
        options = {**spec.options, "where": spec.where}
        if spec.kind != "memory":
            return _Node(handle, spec, options)
        inner, outer = _virtnet.memory_pair(spec.options["capacity"])
        end = MemoryPort(spec, outer)
        if isinstance(handle, PortNode) and handle.end is None:
            handle.end = end
        return _Node(handle, spec, options | {"port": inner}, end)
    options = dict(spec.options)
    if spec.kind == "tee":
        options["program"] = compile_filter(options.pop("filter"))
    if spec.kind == "source":
        size = options.pop("size")
        frames = options.pop("frames") or [discard_frame(size or FRAME_MIN).hex()]
        packets = []
        for text in frames:
            packet, _, offload = text.partition("/")
            frame = bytes.fromhex(packet)
            packets.append(
                (frame if size is None else frame[:size].ljust(size, b"\0"), bytes.fromhex(offload) or PLAIN)
            )
        options["packets"] = packets
    return _Node(handle, spec, options)


def _cpu(number: int) -> int:
    if type(number) is not int or number < 0:
        raise ConfigError(f"cpus are numbers of processors from 0, found {number!r}")
    return number


def _snapshot(raw: dict[str, Any]) -> NetStats:
    return NetStats(
        {name: PortStats(**port) for name, port in raw["ports"].items()},
        {name: FunctionStats(**function) for name, function in raw["functions"].items()},
        Balance(**raw["gone"]),
        WorkerStats(**raw["worker"]),
        tuple(WorkerStats(**worker) for worker in raw["workers"]),
        raw["in_transit"],
    )


def _html_table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def row(tag: str, cells: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row('th', heads)}{''.join(row('td', cells) for cells in rows)}</table>"


def _packets(frames: Frame | Iterable[Frame] | Burst) -> list[tuple[bytes, bytes]]:
    """Frames with their offload metadata."""
    if isinstance(frames, bytes | bytearray | memoryview | SupportsBytes):
        return [(bytes(frames), PLAIN)]
    from virtnet.burst import Burst  # noqa: PLC0415 - see virtnet.__getattr__

    if isinstance(frames, Burst):
        return list(zip(map(bytes, frames), map(bytes, frames.columns.offload.copy()), strict=True))
    return [(bytes(frame), PLAIN) for frame in frames]


def discard_frame(size: int) -> bytes:
    """A broadcast UDP datagram from nobody to the discard port, in a frame of ``size`` bytes at least."""
    ip_len = max(size, FRAME_MIN) - ETHERNET_LEN
    udp = b"".join(n.to_bytes(2, "big") for n in (9, 9, ip_len - 20, 0))
    header = bytearray.fromhex("4500000000000000401100000000000000000000")
    header[2:4] = ip_len.to_bytes(2, "big")
    header[12:20] = bytes([198, 18, 0, 1, 198, 18, 0, 2])  # kept for benchmarks, RFC 2544
    header[10:12] = _checksum(header).to_bytes(2, "big")
    ethernet = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x08\x00"
    return (ethernet + header + udp).ljust(size, b"\0")


def _checksum(data: bytes | bytearray) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
