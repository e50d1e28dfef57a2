"""Composing a network: adding ports and functions, cabling them, changes that belong together."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Literal, SupportsBytes, cast

from virtnet.adding_ports import AddingPorts
from virtnet.description import FunctionSpec, check_options, whole
from virtnet.drawing import check_node
from virtnet.errors import ConfigError
from virtnet.given import by_name, is_number, table, texts
from virtnet.handlers import BurstHandler, ways_of
from virtnet.impairing import Impairment, plain_options
from virtnet.kinds import FRAME_MAX, FRAME_MIN, PLAIN, QUEUE_MAX, QUEUE_SPARE, SOURCE_PACKETS_MAX
from virtnet.nodes import Firewall, Function, Node, PortNode, Switch
from virtnet.routers import RouterMethods
from virtnet.streams import frame_bytes
from virtnet.traffic import TrafficMethods

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from virtnet.burst import Burst, Frame
    from virtnet.elements import Element
    from virtnet.handlers import Late, OnBurst
    from virtnet.impairing import OverTime

__all__ = ["Composing"]


class Composing(AddingPorts, TrafficMethods, RouterMethods):
    """The half of :class:`~virtnet.Net` that describes: what there is, and how it is cabled."""

    def switch(
        self,
        *,
        ageing_s: float = 300.0,
        cables: Mapping[str | Node, Mapping[str, Any]] | None = None,
        loop_guard: int | None = None,
        name: str | None = None,
    ) -> Switch:
        """Adds a switch, which learns who is behind which cable and floods what is for nobody it knows.

        It speaks no protocol with its neighbours, and passes on what theirs send to the addresses that are reserved for
        such (01:80:c2:00:00:00 to 0f), as a cable does.

        Args:
            ageing_s: seconds after which a station that was not heard of is forgotten.
            cables: options of its cables, by the node at the far end, as :meth:`~virtnet.Switch.cable` takes them.
                VLANs are told apart as soon as one cable has one; before that tags are passed on unread.
            loop_guard: how often in a second a station may turn up behind another cable than before. One that does
                more often is held where it is for 10 s, is reported in ``stats().detail["last_flap"]``, and what
                comes from it elsewhere is dropped and counted as ``flapping``.
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> vm1, vm2, uplink = net.memory("vm1"), net.memory("vm2"), net.memory("uplink")
            >>> switch = net.switch(cables={vm1: {"access": 10}, vm2: {"access": 20}, uplink: {"trunk": [10, 20]}})
            >>> _ = vm1 >> switch << vm2 << uplink

        Raises:
            ConfigError: an option makes no sense; the message says which one, of which cable.
        """
        if not is_number(ageing_s) or not 0 < ageing_s < float("inf"):
            raise ConfigError(f"ageing_s is a number of seconds above 0, found {ageing_s!r}")
        if loop_guard is not None and (type(loop_guard) is not int or loop_guard < 1):
            raise ConfigError(f"loop_guard is a number of moves per second from 1, found {loop_guard!r}")
        tables = by_name(cables)
        if not isinstance(tables, dict):
            raise ConfigError(f'cables: expected a table such as {{node: {{"access": 10}}}}, found {cables!r}')
        options = {"ageing_s": float(ageing_s), "cables": tables, "loop_guard": loop_guard}
        return cast("Switch", self._function(name, FunctionSpec("switch", options)))

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
        check_node(branch)
        if type(filter) is not str:
            raise ConfigError(f'filter: expected text such as "tcp port 80", found {filter!r}')
        with self.change():
            self._known(branch.name)
            tee = self._function(name, FunctionSpec("tee", {"branch": branch.name, "filter": filter}))
            self.cable(branch, tee)
        return tee

    def firewall(
        self,
        rules: str | Iterable[str] = "",
        *,
        at: Node | tuple[Node, Node] | None = None,
        inside: Node | str | None = None,
        sets: Mapping[str, Iterable[str]] | None = None,
        default: Literal["pass", "drop", "reject"] = "drop",
        fragments: Literal["follow", "drop"] = "follow",
        states: int = 100_000,
        timeouts: Mapping[str, float] | None = None,
        name: str | None = None,
    ) -> Firewall:
        r"""Adds a firewall, a wire that passes what its rules let pass.

        A packet that belongs to a flow that a rule with ``keep-state`` has let begin passes without a look at the
        rules: both ways, and ICMP errors about it. Of TCP that is what lies in the windows of a connection that began
        with a SYN; of pings, answers; of other protocols, what goes between the same ends. Everything else is judged by
        the first rule that matches, and what none matches by ``default``. A rule that says something of IP matches IP
        only, so ARP needs a rule of its own (``pass proto arp``), and so does neighbour discovery (``proto icmp6``).

        Rules, sets and timeouts change while it runs, and flows stay: ``firewall.set(rules=...)``. A firewall is
        with one worker, whichever packets come from.

        Args:
            rules: one a line; the language is described in :mod:`virtnet.firewalling`.
            at: where it stands: in the cable of a node, which is the inside then, or in that between two, of which the
                first is. Without it it is plugged in like a wire.
            inside: the node on the inside (past wires and tees), for rules that say ``in`` and ``out``.
            sets: addresses and prefixes by name, for rules with ``<name>``. Looking one up costs the same for ten and
                for 100 000.
            default: what is done to what no rule matches.
            fragments: pieces of datagrams ``follow`` the first one, or none passes (``drop``). Those that come before
                it wait, at most 2 s and within bounds (512 datagrams, 4 MiB), and are then dropped (``fragment``).
            states: how many flows are remembered at most. Where there is no room, one that has not been answered is
                forgotten for a new one; otherwise what would begin another is dropped and counted as ``states_full``.
            timeouts: seconds that flows are remembered after their last packet: ``tcp_opening`` (30), ``tcp`` (86400),
                ``tcp_closing`` (60), ``unanswered`` (30), ``udp`` (120), ``icmp`` (20), ``other`` (120).
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> vm, uplink = net.memory("vm"), net.memory("uplink")
            >>> _ = vm >> uplink
            >>> net.firewall("pass proto arp\npass out keep-state", at=vm)
            <firewall 'firewall': not running>

        Raises:
            ConfigError: a rule or an option makes no sense; the message says where, to line and column.
        """
        with self.change():
            ends = None if at is None else self._cable_at(at)
            if ends is not None and inside is None:
                inside = ends[0]
            options = {
                "rules": "\n".join(map(str, lines)) if isinstance(lines := texts(rules), list) else lines,
                "sets": table(sets),
                "inside": inside.name if isinstance(inside, Node) else inside or "",
                "default": default,
                "fragments": fragments,
                "states": states,
                "timeouts": table(timeouts),
            }
            check_options(FunctionSpec("firewall", options))
            firewall = cast("Firewall", self._function(name, FunctionSpec("firewall", options)))
            if ends is not None:
                self.unplug(*ends)
                self.cable(ends[0], firewall)
                self.cable(firewall, ends[1])
        return firewall

    def on_burst(
        self,
        where: Node | tuple[Node, Node],
        filter: str = "",  # noqa: A002 - as above
        *,
        to: Sequence[Node] = (),
        direction: Literal["both", "from", "to"] = "both",
        size: int = 256,
        queue: int = 1024,
        late: Late = "pass",
        name: str | None = None,
    ) -> Callable[[OnBurst], BurstHandler]:
        """Leads packets by the Python function it decorates, which looks at them, changes them, says where they go.

        The function is called with a :class:`~virtnet.Burst`, whose columns are parsed already and whose bytes can be
        written; ``burst.came_from`` is the name of the node the packets come from. It answers with ``None`` (all pass),
        or an array with one of these for each packet: ``True`` or ``"pass"``, ``False`` or ``"drop"``, or the name of a
        node of ``to``. It runs in a thread of its own and never holds a worker up: packets wait for it in a queue, and
        what finds that full is late. What does not pass the filter, or is late and passes, may overtake what waits.

        Args:
            where: a node with one cable, or the two nodes at the ends of a cable.
            filter: which packets, in the language of tcpdump (``"tcp[tcpflags] == tcp-syn"``); all if empty.
            to: nodes that packets can be sent to instead: functions that take another cable, or ports.
            direction: packets ``from`` the node (the first of two), ``to`` it, or both.
            size: packets the function gets at most at a time.
            queue: packets that may wait for it in each direction, 64 to 64_512.
            late: what becomes of others: they ``pass`` by, are dropped (``drop``), or the port they come from is left
                alone (``hold``) until there is room; those that come from elsewhere than a port are dropped then.
            name: what to call it; the function's name if not given.

        Returns:
            A decorator, which makes a :class:`~virtnet.BurstHandler` of the function.

        Raises:
            ConfigError: there is no such place, no such filter, or a number is out of its range.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     vm1, vm2 = net.memory("vm1"), net.memory("vm2")
            ...     _ = vm1 >> net.switch() << vm2
            ...
            ...     @net.on_burst(vm1, direction="from")
            ...     def no_runts(burst):
            ...         return burst.columns.length >= 60
            ...
            ...     _ = vm1.end.tx([bytes(14), bytes(60)])
            ...     vm2.end.rx(timeout_s=5)
            <Burst of 1 packets, 60 bytes>
        """
        if size < 1:
            raise ConfigError(f"size is a number of packets from 1, found {size!r}")
        if direction not in {"both", "from", "to"}:
            raise ConfigError(f"direction is both, from or to, found {direction!r}")
        names = ways_of(to)
        # Told now, and looked for when there is a function: until then there may be other cables.
        for node in where if isinstance(where, tuple) else (where,):
            check_node(node)

        def decorate(handle: OnBurst) -> BurstHandler:
            with self.change():
                a, b = self._cable_at(where)
                options: dict[str, Any] = {"filter": filter, "late": late, "queue": queue, "a": a.name}
                check_options(FunctionSpec("divert", options))
                called = self._name(name, getattr(handle, "__name__", "on_burst"))
                sides: dict[str, PortNode] = {}
                for branch, node, said in (("forth", a, "from"), ("back", b, "to")):
                    if direction in {"both", said}:
                        port = self.memory(self._name(None, f"{called}-{said}"), capacity=queue + QUEUE_SPARE)
                        sides[node.name], options[branch] = port, port.name
                divert = self._function(called, FunctionSpec("divert", options))
                self.unplug(a, b)
                for end in (a, b, *sides.values()):
                    self.cable(end, divert)
                elsewhere = {other: self._injector(self[other], called) for other in names}
            return BurstHandler(handle, divert, sides, elsewhere, size)

        return decorate

    def _injector(self, node: Node, base: str) -> PortNode:
        """A memory port whose packets go to a node, which may be joined to something else already."""
        port = self.memory(self._name(None, f"{base}-to-{node.name}"), capacity=QUEUE_MAX)
        others = self._plan.cables_of(node.name)
        if isinstance(node, Function) or not others:
            self.cable(port, node)
            return port
        options = {"a": node.name, "back": port.name, "enabled": False}
        injector = self._function(self._name(None, f"{base}-at-{node.name}"), FunctionSpec("divert", options))
        self.unplug(node, self[others[0]])
        for end in (node, self[others[0]], port):
            self.cable(end, injector)
        return port

    def _take_injector_out(self, port: PortNode) -> None:
        for name in self._plan.cables_of(port.name):
            function = self[name]
            if isinstance(function, Function) and function.kind == "divert":
                self._take_out(function)
            elif function.kind == "wire":
                self.remove(function)
        self.remove(port)

    def element(self, element: Element | Callable[[Any], Any], *, name: str | None = None) -> Function:
        """Adds an element: a wire that runs a small program on what passes, either way; see :func:`virtnet.element`.

        Packets pass, are dropped (counted as ``filtered``), or go to the nodes that the element names, by cables that
        are plugged in here; what those send ends at the element. ``function.set(program=other.program)`` replaces the
        program while it runs.

        Args:
            element: the element, or the function to make it of.
            name: what to call it; the function's name if not given.

        Raises:
            ConfigError: it sends to nodes that there are not.
        """
        from virtnet.elements import Element

        one = element if isinstance(element, Element) else Element(element)
        with self.change():
            nodes = [self._known(other).handle for other in one.to]
            options = {"program": one.program, "to": list(one.to)}
            function = self._function(self._name(name, one.name), FunctionSpec("element", options))
            for node in nodes:
                self.cable(node, function)
        return function

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
        if rate_pps is not None and (not is_number(rate_pps) or not 0 < rate_pps < float("inf")):
            raise ConfigError(f"rate_pps is a number above 0, or None for no limit, found {rate_pps!r}")
        if count is not None and count < 0:
            raise ConfigError(f"count is a number from 0, or None for no end, found {count!r}")
        if size is not None and not FRAME_MIN <= size <= FRAME_MAX:
            raise ConfigError(f"a frame has {FRAME_MIN} to {FRAME_MAX} bytes, found {size}")
        options: dict[str, Any] = {
            "rate_pps": None if rate_pps is None else float(rate_pps),
            "count": count,
            "size": size,
        }
        if frame is not None:
            options["frames"] = frames = []
            for packet, offload in _packets(frame):
                if not FRAME_MIN <= len(packet if size is None else packet[:size].ljust(size)) <= FRAME_MAX:
                    raise ConfigError(f"a frame has {FRAME_MIN} to {FRAME_MAX} bytes, found {len(packet)}")
                frames.append(packet.hex() + (f"/{offload.hex()}" if offload != PLAIN else ""))
            if not 1 <= len(frames) <= SOURCE_PACKETS_MAX:
                raise ConfigError(f"a source makes copies of 1 to {SOURCE_PACKETS_MAX} packets, found {len(frames)}")
        return self._function(name, FunctionSpec("source", options))

    def echo(self, *, name: str | None = None) -> Function:
        """Adds an echo, which swaps the MAC addresses of every packet and sends it back."""
        return self._function(name, FunctionSpec("echo"))

    def impair(
        self,
        a: Node | None = None,
        b: Node | None = None,
        *,
        delay_ms: OverTime = 0.0,
        jitter_ms: OverTime = 0.0,
        distribution: Literal["uniform", "normal", "pareto"] | Sequence[float] = "uniform",
        keep_order: bool = False,
        loss: OverTime = 0.0,
        gemodel: Sequence[float] | None = None,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        rate_bps: OverTime | None = None,
        rate_pps: OverTime | None = None,
        burst_bytes: float = 0.0,
        burst_packets: float = 0.0,
        queue_packets: int = 1000,
        queue_bytes: int | None = None,
        step_s: float = 1.0,
        direction: Literal["both", "from", "to"] = "both",
        seed: int | None = None,
        name: str | None = None,
    ) -> Impairment:
        """Adds a cable with faults, and plugs in the nodes given; where the two are joined already, into that cable.

        A packet is lost or not, waits in a buffer until the rate lets it go, and is then delayed. What is asked for
        can be changed while it runs, in place: ``cable.set(delay_ms=50)``. What waits has been copied, so nobody's
        buffers are kept; ``cable.report()`` tells what was asked for and what came of it.

        ``delay_ms``, ``jitter_ms``, ``loss``, ``rate_bps`` and ``rate_pps`` are numbers or arrays: values of ``step_s``
        seconds each, from the first again after the last, counted from the first packet or the last change.

        Args:
            a: the node at one end. What comes from it has the direction ``from``.
            b: the node at the other end.
            delay_ms: how long a packet is on its way, up to an hour.
            jitter_ms: how much that varies. A delay below 0 is 0.
            distribution: how it varies: ``uniform``, by up to the jitter either way; ``normal``, with the jitter as
                standard deviation; ``pareto``, likewise with a long tail (shape 3, moved to mean 0); or numbers, of
                which one is drawn and multiplied by the jitter.
            keep_order: make delays longer that would let a packet overtake another.
            loss: probability that a packet is lost.
            gemodel: losses that come together, beside the others, after Gilbert and Elliott, as four probabilities:
                that a good cable turns bad, that a bad one turns good, of loss while bad, of loss while good.
            duplicate: probability that a packet comes twice, each with a delay of its own.
            reorder: probability that a packet is not delayed, and so overtakes others.
            corrupt: probability that a bit is turned over. What was left to a receiver to finish is finished first.
            rate_bps: bits of frames a second, without preamble and checksum; 0 is an outage.
            rate_pps: packets a second.
            burst_bytes: how much may leave at once after a pause; 0: a packet leaves when its last bit would have.
            burst_packets: the same for ``rate_pps``.
            queue_packets: packets that may wait for the rate; what comes then is dropped as ``queue_full``.
            queue_bytes: bytes of them. Whatever is asked for, 256 MiB of packets wait in each direction at most.
            step_s: seconds that each value of an array holds.
            direction: packets ``from`` the first node, ``to`` it, or both.
            seed: two of the same seed lose the same packets, in every run; made from the name if not given.
            name: what to call it.

        Raises:
            ConfigError: a value is out of its range, or a node has no free end for a cable.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     near, far = net.memory("near"), net.memory("far")
            ...     cable = net.impair(near, far, delay_ms=20)
            ...     _ = near.end.tx([bytes(60)])
            ...     _ = far.end.rx(timeout_s=5)
            ...     cable.report().from_a.delay_ms["min"] >= 20
            True
        """
        options = plain_options(
            {
                "delay_ms": delay_ms,
                "jitter_ms": jitter_ms,
                "distribution": distribution,
                "keep_order": keep_order,
                "loss": loss,
                "gemodel": gemodel,
                "duplicate": duplicate,
                "reorder": reorder,
                "corrupt": corrupt,
                "rate_bps": rate_bps,
                "rate_pps": rate_pps,
                "burst_bytes": burst_bytes,
                "burst_packets": burst_packets,
                "queue_packets": queue_packets,
                "queue_bytes": queue_bytes,
                "step_s": step_s,
                "direction": direction,
            }
        )
        for node in (a, b):
            if node is not None:
                check_node(node)
        with self.change():
            called = self._name(name, "impairment")
            options["seed"] = zlib.crc32(called.encode()) if seed is None else seed
            options["a"] = a.name if a is not None else ""
            spec = FunctionSpec("impairment", options)
            check_options(whole(spec))
            if a is not None and b is not None and b.name in self._plan.cables_of(self._known(a.name).handle.name):
                self.unplug(a, b)
            elif isinstance(a, PortNode) and isinstance(b, PortNode) and f"{a.name}-{b.name}" in self._plan.nodes:
                self.remove(f"{a.name}-{b.name}")
            cable = self._function(called, spec)
            for node in (a, b):
                if node is not None:
                    self.cable(node, cable)
        return cast("Impairment", cable)


def _packets(frames: Frame | Iterable[Frame] | Burst) -> list[tuple[bytes, bytes]]:
    """Frames with their offload metadata."""
    if isinstance(frames, bytes | bytearray | memoryview | SupportsBytes):
        return [(frame_bytes(frames), PLAIN)]
    from virtnet.burst import Burst

    if isinstance(frames, Burst):
        return list(zip(map(bytes, frames), map(bytes, frames.columns.offload.copy()), strict=True))
    given = texts(frames)
    return [(frame_bytes(frame), PLAIN) for frame in (given if isinstance(given, list) else [given])]
