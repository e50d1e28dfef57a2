"""Counters as values: a snapshot never changes, and two of them subtract.

``received`` is what came into the network, ``sent`` what left it. Every packet is accounted for: what a port received,
a source made and a switch copied is what was sent, what a sink took and what was dropped, by reason.
:meth:`NetStats.balance` says whether it adds up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from virtnet.features import NetFeature, ProtocolFeature, RingFeature

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Balance",
    "DeviceStats",
    "FunctionStats",
    "Lease",
    "NetStats",
    "PortStats",
    "QueueStats",
    "RingState",
    "UserNetStats",
    "WorkerStats",
]


def _sum(*drops: Mapping[str, int]) -> dict[str, int]:
    """Counts by reason, added up; reasons that have not happened are left out."""
    total: Counter[str] = Counter()
    for counts in drops:
        total.update(counts)
    return {reason: n for reason, n in sorted(total.items()) if n}


def _reasons(drops: Mapping[str, int]) -> str:
    """Counts by reason, as text."""
    return ", ".join(f"{n} {reason}" for reason, n in drops.items()) or "0"


@dataclass(frozen=True, slots=True)
class Lease:
    """An address that a guest of a user-mode network has by DHCP.

    Attributes:
        mac: the guest's MAC address.
        ip: its address.
        host_name: what it calls itself, or is told to.
        expires_s: seconds until it has to ask again, ``None`` for an address that is always its own.
    """

    mac: str
    ip: str
    host_name: str | None = None
    expires_s: int | None = None


@dataclass(frozen=True, slots=True)
class UserNetStats:
    """How the gateway of a user-mode network stands.

    Attributes:
        leases: addresses given, in order.
        tcp_flows: TCP connections that are carried now.
        udp_flows: UDP conversations, likewise.
        ping_flows: series of echo requests to the outside, likewise.
        flows: flows of all kinds since the start.
        answered: answers of the gateway's own: ARP, neighbours, echo, DHCP, DNS.
        lost: packets that went no further, by reason. They are none of the port's drops: it did hand them over.
        listening: where the host listens for each forwarded port.
    """

    leases: tuple[Lease, ...] = ()
    tcp_flows: int = 0
    udp_flows: int = 0
    ping_flows: int = 0
    flows: int = 0
    answered: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    listening: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> UserNetStats:
        """From plain values."""
        leases = tuple(Lease(**lease) for lease in raw["leases"])
        return cls(**{**raw, "leases": leases, "listening": tuple(raw["listening"])})


@dataclass(frozen=True, slots=True)
class PortStats:
    """What has passed a port, and what was agreed with its other end.

    Attributes:
        received: packets that came in by this port, with those in ``rx_drops``.
        sent: packets that left by this port.
        rx_drops: of ``received``, those that went no further, by reason.
        tx_drops: packets that were to leave by this port and did not, by reason.
        notifications: kicks or calls written to the other end.
        segmented: frames made of longer ones because the other end takes no long ones, beyond the first of each.
        connected: whether somebody is at the other end now.
        features: the negotiated word, ``None`` when there is nobody or nothing to negotiate.
        ring: ``split`` or ``packed``, ``None`` likewise.
        queue_pairs: pairs of queues in use, 0 when there are none.
        state: ``listening``, ``connecting``, ``connected`` or ``running``; of a capture that is written ``writing``,
            ``waiting`` for somebody who reads, or ``ended``; ``None`` where there is no session.
        sessions: how often somebody has come to the other end.
        last_error: what ended the last session or was refused last.
        offered: the word of features that was offered, ``None`` where there is nothing to negotiate.
        step: how far a front-end has come: ``greeting``, ``features`` agreed on, ``memory`` handed over, ``rings``
            started, ``running``; ``None`` while nobody is there.
        last_step: how far the last one had come that left.
        peer_pid: the process at the other end, where the system tells.
        refusals: requests of front-ends that were refused.
        xdp: of an AF_XDP port, where its program runs and who copies: ``native, zero-copy``, ``native, copy`` or
            ``generic, copy``.
        detail: what only its kind counts, by name. A VXLAN port: ``copies`` sent to remotes, ``copies_lost`` of packets
            that reached others, ``stations`` it knows.
        mac: the MAC address that the device tells its driver, ``None`` where it tells none.
        link_up: whether the device says that the link is up, or the interface is; ``None`` where nobody says.
        mtu: the largest payload of a frame that the device tells, or the interface has, likewise.
        speed_mbps: the speed that it tells, likewise.
        user_net: of a user-mode network, how its gateway stands.
    """

    kind: str = "memory"
    received: int = 0
    sent: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    rx_drops: dict[str, int] = field(default_factory=dict)
    tx_drops: dict[str, int] = field(default_factory=dict)
    notifications: int = 0
    segmented: int = 0
    connected: bool = False
    features: int | None = None
    protocol_features: int | None = None
    ring: str | None = None
    queue_pairs: int = 0
    state: str | None = None
    sessions: int = 0
    last_error: str | None = None
    offered: int | None = None
    step: str | None = None
    last_step: str | None = None
    peer_pid: int | None = None
    refusals: int = 0
    xdp: str | None = None
    detail: dict[str, int] = field(default_factory=dict)
    mac: str | None = None
    link_up: bool | None = None
    mtu: int | None = None
    speed_mbps: int | None = None
    user_net: UserNetStats | None = None

    def __post_init__(self) -> None:
        """Makes values of plain ones."""
        given: Any = self.user_net
        if isinstance(given, dict):
            object.__setattr__(self, "user_net", UserNetStats.of(given))

    @property
    def drops(self) -> dict[str, int]:
        """Packets dropped at this port in either direction, by reason."""
        return _sum(self.rx_drops, self.tx_drops)

    @property
    def net_features(self) -> NetFeature:
        """The negotiated features of the network device."""
        return NetFeature.within(self.features or 0)

    @property
    def ring_features(self) -> RingFeature:
        """The negotiated features of rings and transport."""
        return RingFeature.within(self.features or 0)

    @property
    def logging(self) -> bool:
        """Whether what is written to the other end's memory is logged now, because its guest is about to move."""
        return RingFeature.LOG_ALL in self.ring_features

    @property
    def protocol(self) -> ProtocolFeature:
        """The negotiated features of the vhost-user protocol."""
        return ProtocolFeature(self.protocol_features or 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; features by name."""
        return {
            "kind": self.kind,
            "received": self.received,
            "sent": self.sent,
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "drops": self.drops,
            "notifications": self.notifications,
            "segmented": self.segmented,
            "connected": self.connected,
            "features": [*self.net_features.names(), *self.ring_features.names()],
            "protocol_features": self.protocol.names(),
            "ring": self.ring,
            "queue_pairs": self.queue_pairs,
            "state": self.state,
            "sessions": self.sessions,
            "last_error": self.last_error,
            "step": self.step,
            "refusals": self.refusals,
            "logging": self.logging,
            "xdp": self.xdp,
            "detail": self.detail,
            "mac": self.mac,
            "link_up": self.link_up,
            "mtu": self.mtu,
            "speed_mbps": self.speed_mbps,
            "user_net": asdict(self.user_net) if self.user_net else None,
        }


@dataclass(frozen=True, slots=True)
class RingState:
    """How one ring of a port stands. Positions are those of this side: of the device, or of the driver.

    Attributes:
        index: its number, from 0.
        kind: ``receiveq`` or ``transmitq``, as the driver sees it.
        started: whether it runs.
        enabled: whether it is enabled; remembered while it is stopped.
        size: how many entries it has, ``None`` while it is stopped; so are the following.
        format: ``split`` or ``packed``.
        avail: the next available entry: an index from 0 to 65535 of a split ring, a slot of a packed one.
        used: the next used entry, likewise.
        avail_wrap: the wrap counter at ``avail``, of a packed ring.
        used_wrap: the wrap counter at ``used``, of a packed ring.
        published: of a split ring, the index that the other side has published.
        waiting: what the other side has published and this one has not looked at: chains of a split ring, slots of a
            packed one. A driver knows of a packed ring only whether it is none (0) or some (1).
        kick: whether there is an event that says that buffers are available; without one the device polls.
        call: whether there is an event that says that buffers are used; without one the driver polls.
        kicks: notifications of available buffers, as many as the device heard, or the driver gave. Whoever polls hears
            none.
        calls: notifications of used buffers that the device gave; a driver does not count them.
        bursts: times that this side has shown buffers to the other. Where it has notified less often, the other side
            did not want to be told (event index), or later (coalescing).
        taken_again: chains that a device before this one had taken when it was killed, and that this one has taken
            again, as far as that is known: by a record of what is in flight, or by where a split ring was to go on.
        broken: why the ring had to be given up, ``None`` if it was not.
    """

    index: int
    kind: str
    started: bool = False
    enabled: bool = False
    size: int | None = None
    format: str | None = None
    avail: int | None = None
    used: int | None = None
    avail_wrap: bool | None = None
    used_wrap: bool | None = None
    published: int | None = None
    waiting: int | None = None
    kick: bool = False
    call: bool = False
    kicks: int = 0
    calls: int = 0
    bursts: int = 0
    taken_again: int = 0
    broken: str | None = None

    @property
    def queue_pair(self) -> int:
        """The number of its queue pair, from 0."""
        return self.index // 2

    def __str__(self) -> str:
        """The ring in a line."""
        name = f"ring {self.index} ({self.kind} of pair {self.queue_pair})"
        if self.broken is not None:
            return f"{name} was given up: {self.broken}"
        if not self.started:
            return f"{name} is stopped and {'enabled' if self.enabled else 'disabled'}"
        wraps = (
            f" (wrap {self.avail_wrap:d} and {self.used_wrap:d})"
            if self.avail_wrap is not None and self.used_wrap is not None
            else ""
        )
        silent = [word for word, there in (("kick", self.kick), ("call", self.call)) if not there]
        polls = f", without {' and '.join(silent)}" if silent else ""
        return (
            f"{name} runs{'' if self.enabled else ' and is disabled'}: {self.format}, {self.size} entries, "
            f"next available {self.avail}, next used {self.used}{wraps}, {self.waiting} waiting{polls}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What a device has counted at one of its queues; "receive" is the driver's view, as everywhere in virtio.

    Attributes:
        kicks: notifications of the driver.
        packets: packets that went through.
        bytes: their bytes.
        calls: notifications of the device.
        drops: packets dropped for any reason.
        drops_by_driver: of ``drops``, those for lack of buffers (receive), or that made no sense (transmit).
    """

    kicks: int = 0
    packets: int = 0
    bytes: int = 0
    calls: int = 0
    drops: int = 0
    drops_by_driver: int = 0


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What a device tells its driver that it has counted. Spec: virtio 1.4, 5.1.9.5.11, Device Statistics.

    Attributes:
        receive: each receiveq, in order.
        transmit: each transmitq, in order.
    """

    receive: tuple[QueueStats, ...] = ()
    transmit: tuple[QueueStats, ...] = ()


@dataclass(frozen=True, slots=True)
class FunctionStats:
    """What a network function did to the packets it met.

    Attributes:
        generated: packets it made.
        consumed: packets it took for good.
        copied: packets it made from others, such as a flood's second and further copies.
        drops: packets it dropped, by reason.
        detail: what only its kind counts. Of a switch: ``entries`` (stations in its tables), ``learned``, ``moved``,
            ``aged``, ``table_full`` (packets whose sender found no place), ``flooded``, ``flaps`` that its loop guard
            has found, and the ``last_flap`` (``vlan``, ``mac``, ``cable``). Of what :meth:`Net.on_burst` puts in:
            ``late`` (packets that Python had no time for). Of a firewall: ``states`` (flows that are remembered),
            ``created``, ``expired``, ``evicted`` (to make room), ``known`` (packets of flows), ``refused`` (refusals
            sent), ``rules`` (see :attr:`Firewall.rules <virtnet.Firewall.rules>`). Of a router: ``routes``,
            ``neighbours`` it knows, packets ``waiting`` for one, ``forwarded`` in place, ``asked`` and ``answered``
            (questions for addresses), ``echo_answered``, ``errors_sent``, ``errors_suppressed``, ``fragmented``. What
            waits or is cut has been consumed; what leaves then is generated. Of a generator: ``streams``, of each
            ``id``, ``sent``, ``sent_bytes``, how many of its count are ``left``, ``first_ns`` and ``last_ns``. Of an
            analyser: what :meth:`Analyser.report <virtnet.Analyser.report>` tells.
    """

    kind: str = "switch"
    generated: int = 0
    consumed: int = 0
    copied: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RuleStats:
    """What a rule of a firewall has counted: what it matched, and the flows that it has let begin.

    Attributes:
        text: the rule; empty for what none matched.
        packets: packets.
        bytes: their bytes.
    """

    text: str
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """Where all packets came from and where they went.

    Attributes:
        received: packets that ports received.
        generated: packets that functions made.
        copied: further copies that flooding made, and segments beyond the first of a frame.
        sent: packets that ports sent.
        consumed: packets that ended in a function.
        dropped: packets dropped anywhere.
        in_transit: packets that wait in an impaired cable or are between two workers. Workers' counters are read one
            after the other: what has passed meanwhile is in it, also below zero. 0 at rest.
    """

    received: int = 0
    generated: int = 0
    copied: int = 0
    sent: int = 0
    consumed: int = 0
    dropped: int = 0
    in_transit: int = 0

    @property
    def missing(self) -> int:
        """Packets that are unaccounted for: 0, always."""
        gone = self.sent + self.consumed + self.dropped + self.in_transit
        return self.received + self.generated + self.copied - gone

    @property
    def exact(self) -> bool:
        """Whether every packet is accounted for."""
        return self.missing == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"exact": self.exact}


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What the thread that moves a network's packets has done.

    Attributes:
        breaths: how often it looked at its ports.
        busy_breaths: how often it found packets there.
        sleeps: how often it went to sleep because nothing came.
        cpu_s: seconds of processor time it used.
        longest_pause_s: the longest time, in seconds, from the beginning of one round to that of the next, sleep left
            out: so long a packet may have waited for it. What the host kept its thread from running is part of that.
    """

    breaths: int = 0
    busy_breaths: int = 0
    sleeps: int = 0
    cpu_s: float = 0.0
    longest_pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NetStats:
    """A network's counters at one moment, by name.

    Attributes:
        ports: the ports that are there.
        functions: the network functions that are there.
        gone: the sums of all that were there once and have been removed.
        worker: what it cost, all workers together.
        workers: what each worker did.
        in_transit: packets between two workers; see :class:`Balance`.
    """

    ports: dict[str, PortStats] = field(default_factory=dict)
    functions: dict[str, FunctionStats] = field(default_factory=dict)
    gone: Balance = field(default_factory=Balance)
    worker: WorkerStats = field(default_factory=WorkerStats)
    workers: tuple[WorkerStats, ...] = ()
    in_transit: int = 0

    @property
    def drops(self) -> dict[str, int]:
        """Packets dropped anywhere, by reason."""
        return _sum(
            *(port.drops for port in self.ports.values()),
            *(function.drops for function in self.functions.values()),
        )

    def balance(self) -> Balance:
        """Adds up where all packets came from and where they went."""
        ports, functions, gone = self.ports.values(), self.functions.values(), self.gone
        return Balance(
            received=gone.received + sum(port.received for port in ports),
            generated=gone.generated + sum(function.generated for function in functions),
            copied=gone.copied + sum(function.copied for function in functions) + sum(port.segmented for port in ports),
            sent=gone.sent + sum(port.sent for port in ports),
            consumed=gone.consumed + sum(function.consumed for function in functions),
            dropped=gone.dropped + sum(self.drops.values()),
            in_transit=self.in_transit,
        )

    def _repr_html_(self) -> str:
        """What passed each node, and whether it adds up, for notebooks."""
        from virtnet.showing import table

        ports = [(name, one.kind, one.received, one.sent, _reasons(one.drops)) for name, one in self.ports.items()]
        functions = [
            (name, one.kind, one.generated, one.consumed, one.copied, _reasons(one.drops))
            for name, one in self.functions.items()
        ]
        balance = self.balance().to_dict()
        return (
            table(["port", "", "received", "sent", "dropped"], ports)
            + table(["function", "", "generated", "consumed", "copied", "dropped"], functions)
            + table(balance, [balance.values()])
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetStats:
        """Makes a snapshot of plain values, named like the fields of these classes; others are left out."""

        def made(of: type[Any], values: Mapping[str, Any]) -> Any:
            return of(**{name: value for name, value in values.items() if name in of.__dataclass_fields__})

        return cls(
            {name: made(PortStats, port) for name, port in fields["ports"].items()},
            {name: made(FunctionStats, function) for name, function in fields["functions"].items()},
            made(Balance, fields["gone"]),
            made(WorkerStats, fields["worker"]),
            tuple(made(WorkerStats, worker) for worker in fields["workers"]),
            fields["in_transit"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ports": {name: port.to_dict() for name, port in self.ports.items()},
            "functions": {name: function.to_dict() for name, function in self.functions.items()},
            "network_drops": _sum(*(function.drops for function in self.functions.values())),
            "balance": self.balance().to_dict(),
            "worker": asdict(self.worker),
            "workers": [asdict(worker) for worker in self.workers],
        }
