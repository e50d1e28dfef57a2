"""Ports by hand: bursts in, bursts out, like a poll-mode driver.

::

    with VhostUserPort("vm1.sock") as port:        # a guest attaches here
        while True:
            burst = port.rx(timeout_s=1.0)
            port.tx(burst[burst.columns.ip_proto == 17])

Every kind of port has the same face. ``rx`` is into the program, ``tx`` out of it, whatever the other end calls it.
A port opens when it is made and closes with its block, or by :meth:`Port.close`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, Self

from virtnet import _virtnet
from virtnet.commanding import DeviceCommands
from virtnet.errors import ConfigError, StateError
from virtnet.events import events_of, wait_for_event
from virtnet.explaining import Explanation, explain
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from virtnet.burst import Burst, Frame
    from virtnet.events import Event, Events
    from virtnet.features import NetFeature, RingFeature
    from virtnet.stats import Lease, PortStats, RingState, UserNetStats

    Features = NetFeature | RingFeature | str | Iterable[NetFeature | RingFeature | str]

__all__ = [
    "AfPacketPort",
    "AfXdpPort",
    "DgramPort",
    "MemoryPort",
    "PcapPort",
    "Port",
    "StreamPort",
    "TapPort",
    "UserNetPort",
    "VhostUserPort",
    "VirtioUserPort",
    "VxlanPort",
    "memory_pair",
    "open_port",
]

#: What one ``rx`` brings at most, when nothing else is said.
RX_MAX = 256


@functools.cache
def _burst_class() -> type[Burst]:
    """Imported when packets pass first, because it needs numpy, and looked up once: a burst is soon over."""
    from virtnet.burst import Burst

    return Burst


class Port:
    """A place where packets enter and leave; made by its subclasses, :func:`open_port` and :func:`memory_pair`.

    Threads: may be used from any; a second waits while the first is in ``rx`` or ``tx``.
    """

    def __init__(self, spec: PortSpec, native: _virtnet.Port | None = None) -> None:
        """Opens the port that is specified."""
        self.spec = spec
        self._closed = False
        self._native = native or _virtnet.Port(spec.kind, spec.where, dict(spec.options))

    @property
    def native(self) -> _virtnet.Port:
        """The compiled half, for the rest of the package."""
        return self._native

    def rx(self, timeout_s: float | None = 0.0, *, max_packets: int = RX_MAX) -> Burst:
        """Takes packets that have arrived.

        Args:
            timeout_s: seconds to wait for the first one; 0 only looks, ``None`` waits for ever. Ctrl-C ends the wait.
            max_packets: how many to take at most.

        Returns:
            The packets, none when the time is over.

        Raises:
            StateError: the port is closed.
        """
        if timeout_s is not None and not timeout_s >= 0:
            raise ConfigError(f"timeout_s is a number of seconds from 0, or None for ever, found {timeout_s!r}")
        if max_packets < 1:
            raise ConfigError(f"max_packets is at least 1, found {max_packets!r}")
        return _burst_class()._rx(self._open(), max_packets, timeout_s)  # noqa: SLF001 - how bursts are made

    def tx(self, packets: Burst | Iterable[Frame]) -> int:
        """Sends packets: a burst, or anything that has their bytes.

        Returns:
            How many were accepted, counted from the front; the rest found no room, or nobody at the other end. An
            accepted packet that the other end cannot take (too big for it) is counted in ``stats().tx_drops``.

        Raises:
            StateError: the port is closed, or the burst released.
            ConfigError: a frame is empty or longer than any network carries.
        """
        burst_class = _burst_class()
        burst = packets if isinstance(packets, burst_class) else burst_class(packets)
        return burst._tx(self._open())  # noqa: SLF001 - the same

    def wait_connected(self, timeout_s: float | None = None) -> bool:
        """Waits until somebody is at the other end and ready for packets; whether that happened in time."""
        return self._open().wait_connected(timeout_s)

    def stats(self) -> PortStats:
        """What has passed, and what was agreed with the other end. Stays readable after the port is closed."""
        from virtnet.stats import PortStats

        return PortStats(**self._native.stats())

    @property
    def events(self) -> Events:
        """What has happened since the port was opened; stays readable after the port is closed."""
        return events_of(self._native.events)

    def wait_event(self, kind: str, timeout_s: float | None = None, *, since: int = 0) -> Event | None:
        """Waits for an event; one that has happened already counts.

        Args:
            kind: one of :attr:`virtnet.Event.KINDS`.
            timeout_s: seconds to wait, for ever if not given. Ctrl-C ends the wait.
            since: the number of the first event that counts: one more than the last one's, to wait for a new one.

        Returns:
            The first such event, ``None`` when the time is over.

        Raises:
            ConfigError: there is no such kind.
        """
        return wait_for_event(self._native.events, kind, timeout_s, since)

    @property
    def rings(self) -> tuple[RingState, ...]:
        """How its rings stand, in order of their numbers; none where there are no rings."""
        from virtnet.stats import RingState

        return tuple(RingState(**ring) for ring in self._native.rings())

    def explain(self) -> Explanation:
        """How the port stands, in words: how far the other end has come, what is missing, what to do."""
        return explain(self.stats(), self.spec, runs=not self._closed, rings=() if self._closed else self.rings)

    @property
    def connected(self) -> bool:
        """Whether somebody is at the other end now."""
        return not self._closed and self.stats().connected

    def close(self) -> None:
        """Gives everything back: the socket, the memory, the interface. Again does nothing."""
        self._closed = True
        self._native.close()

    def _open(self) -> _virtnet.Port:
        if self._closed:
            raise StateError(f"the port {self.spec} is closed")
        return self._native

    def __enter__(self) -> Self:
        """The port, closed at the end of the block."""
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes it."""
        self.close()

    def __repr__(self) -> str:
        """What it is and how it is."""
        if self._closed:
            return f"<{type(self).__name__} {self.spec}, closed>"
        return f"<{type(self).__name__} {self.spec}, {describe(self.stats())}>"


class VhostUserPort(Port):
    """A network device for somebody else's driver: QEMU or DPDK attaches to its socket.

    Args:
        path: the socket.
        client: connect to a socket on which the other end listens, again and again, rather than listen.
        queue_pairs: how many pairs of queues to offer.
        mtu: the largest payload of a frame to tell the guest.
        mac: the MAC address to tell the guest. QEMU gives its guests one of its own: see ``qemu_args(mac=...)``.
        speed_mbps: the speed of the link to tell the guest.
        rss: in a network with several workers, keep all queue pairs with one of them. Only so they are offered
            receive-side scaling, whose hash may point at any pair; spread over workers, flows are received where they
            are sent.
        postcopy: offer to wait for pages of memory that arrive after the guest (post-copy migration). Whatever shares a
            worker with the port waits as well, so trust the other end, or give the port a worker of its own.
        in_band: offer notifications that are messages, for other ends that have no eventfds. QEMU accepts this offer
            and cannot keep it: leave it off there.
        without: features not to offer, as flags or names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        client: bool = False,
        queue_pairs: int = 1,
        mtu: int | None = None,
        mac: str | None = None,
        speed_mbps: int | None = None,
        rss: bool = False,
        postcopy: bool = False,
        in_band: bool = False,
        without: Features | None = None,
    ) -> None:
        """Listens, or starts to connect."""
        options = {
            "client": client,
            "queue_pairs": queue_pairs,
            "mtu": mtu,
            "mac": mac,
            "speed_mbps": speed_mbps,
            "rss": rss,
            "postcopy": postcopy,
            "in_band": in_band,
            "without": without,
        }
        super().__init__(PortSpec.of("vhost-user", str(path), **options))

    def set_link(self, up: bool) -> None:
        """Takes the link down, or up again. While it is down no packet passes, in either direction.

        A driver that has negotiated STATUS is told, where its front-end reads the configuration space from here; QEMU
        does not, its guests see what its monitor's ``set_link`` says.

        Raises:
            StateError: the port is closed.
        """
        self._open().set_link(up)


class VirtioUserPort(Port, DeviceCommands):
    """A driver for somebody else's network device: it attaches to a vhost-user back-end as a guest would.

    By hand it agrees to no offloads: frames have their checksums, and none is longer than the link's.

    Args:
        path: the socket.
        server: listen, for back-ends that connect.
        queue_pairs: how many pairs of queues to use.
        queue_size: descriptors in each.
        ring: the format of the rings.
        in_order: ask for buffers to be used in the order they were made available.
        control: use a control queue, which the methods of :class:`~virtnet.commanding.DeviceCommands` need, where the
            back-end offers one. That it also serves it cannot be seen: virtnet's vhost-user ports do, DPDK's offer one
            that nobody serves. A device that wants to be announced, because it has come to another host, is told that
            it is, and the event ``announce`` says that whoever stands behind the port is to send something.
        hash_report: have the device tell the hash of each packet (``burst.columns.hash``); needs ``control``.
        iommu: be behind an IOMMU: each page that the back-end is to touch it has to ask for. It must offer
            ACCESS_PLATFORM then.
        in_flight: have the back-end record which buffers it holds, where it can, so that the queues are kept when it is
            killed and comes back: nothing in them is lost or delivered twice. With packed rings that has a price:
            ``benchmarks/README.md`` says which.
        in_band: notify, and be notified, by messages instead of eventfds. The back-end must offer INBAND_NOTIFICATIONS
            then, as vhost-user ports with ``in_band=True`` do. Slower, and for trying such back-ends out.
        without: features not to accept, as flags or names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        server: bool = False,
        queue_pairs: int = 1,
        queue_size: int = 256,
        ring: Literal["split", "packed"] = "split",
        in_order: bool = True,
        control: bool = False,
        hash_report: bool = False,
        iommu: bool = False,
        in_flight: bool = True,
        in_band: bool = False,
        without: Features | None = None,
    ) -> None:
        """Connects, or starts to listen."""
        options = {
            "server": server,
            "queue_pairs": queue_pairs,
            "queue_size": queue_size,
            "ring": ring,
            "in_order": in_order,
            "control": control,
            "hash_report": hash_report,
            "iommu": iommu,
            "in_flight": in_flight,
            "in_band": in_band,
            "without": without,
        }
        super().__init__(PortSpec.of("virtio-user", str(path), **options))

    def _command(self, name: str, **arguments: Any) -> None:
        self._open().command(name, arguments)

    def _ask_stats(self, asked: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        return self._open().device_stats({"asked": asked})

    def _device_state(self, state: bytes | None) -> bytes:
        return self._open().device_state(state)


class TapPort(Port):
    """An interface of the Linux kernel, made if there is none of that name. Needs CAP_NET_ADMIN.

    Args:
        name: the interface.
        mtu: the largest payload of a frame to set.
        queue_pairs: how many pairs of queues it has; the host uses as many processors to send to it. In a network each
            worker has some of them. An interface that is there already must have been made for several.
        netns: the network namespace that it is in: a name of ``ip netns``, a path, or ``pid:NUMBER``.
    """

    def __init__(self, name: str, *, mtu: int | None = None, queue_pairs: int = 1, netns: str | None = None) -> None:
        """Makes or attaches the interface."""
        super().__init__(PortSpec.of("tap", name, mtu=mtu, queue_pairs=queue_pairs, netns=netns))


class AfPacketPort(Port):
    """A network interface of the host that is there already, such as a card or one end of a veth pair.

    What arrives on it is received beside the host's own network stack, what is sent leaves by it. Needs CAP_NET_RAW.
    Other virtual interfaces leave checksums and segments to be done: ``columns.offload`` says what, also by hand.

    Args:
        interface: the interface.
        queues: how many packet sockets share what arrives, 1 to 128: a flow, in both directions, is received on one of
            them. In a network each worker has some of them. Several need Linux 5.11.
        promiscuous: receive frames for other stations too, as whoever bridges has to.
        netns: the network namespace that it is in, as for :class:`TapPort`.
    """

    def __init__(self, interface: str, *, queues: int = 1, promiscuous: bool = True, netns: str | None = None) -> None:
        """Opens packet sockets on the interface."""
        spec = PortSpec.of("af-packet", interface, queues=queues, promiscuous=promiscuous, netns=netns)
        super().__init__(spec)


class VxlanPort(Port):
    """A network stretched over an IP network: frames travel inside UDP datagrams to other hosts. Source: RFC 7348.

    The other ends are VXLAN interfaces of Linux or of switches, or other such ports. What is for everybody, or for a
    station that is not known, goes to every remote, a copy each. There is no secrecy and no proof of who sends: let
    only networks that you trust carry it.

    Frames travel whole, with their checksums. (Where the way leaves a Linux host by a veth pair, that host leaves the
    checksums of what is inside to be done, and nobody does them: ``ethtool -K VETH tx off`` there ends that.)

    A frame becomes 50 bytes longer over IPv4, 70 over IPv6, its own Ethernet header not counted twice. Datagrams are
    not cut into fragments: what is longer than the way allows is dropped and counted as ``too_big``. So tell the
    stations an MTU of 1450 (1430 over IPv6) where the network below has 1500, or raise that by as much.

    Args:
        local: an address of this host, or 0.0.0.0 or ::, with the UDP port behind it if that is not 4789.
        vni: the number of the virtual network, 0 to 16777215. Datagrams of others are counted as ``wrong_vni``.
        remotes: the other hosts, at most 64, with their UDP ports if those are not 4789. Datagrams of others are
            counted as ``unknown_sender``.
        learn: send what is for a station that was heard of to its host only.
        ageing_s: seconds after which a station that was not heard of is forgotten.
        anyone: receive from anybody who knows the number; together with ``learn`` there need be no remotes.
        source_ports: how many UDP ports to send from, by flow, so that routers and cards spread flows; 0 sends from the
            local one.
        netns: the network namespace whose addresses and routes are used, as for :class:`TapPort`.
    """

    def __init__(
        self,
        local: str,
        *,
        vni: int,
        remotes: Iterable[str] = (),
        learn: bool = True,
        ageing_s: int = 300,
        anyone: bool = False,
        source_ports: int = 16,
        netns: str | None = None,
    ) -> None:
        """Opens the sockets."""
        options = {
            "vni": vni,
            "remotes": remotes if isinstance(remotes, str) else tuple(remotes),
            "learn": learn,
            "ageing_s": ageing_s,
            "anyone": anyone,
            "source_ports": source_ports,
            "netns": netns,
        }
        super().__init__(PortSpec.of("vxlan", local, **options))


class StreamPort(Port):
    """A connection that frames go through, each behind its length: QEMU's ``-netdev stream``, or another such port.

    One peer at a time; the next one waits. A peer that sends what is no frame loses its connection.

    Args:
        where: a unix socket's path, or an IP address and a TCP port (``127.0.0.1:5000``). Whoever reaches an address
            may connect: prefer paths, which only your user can.
        client: connect, again and again, to somebody who listens there, rather than listen.
        netns: the network namespace for TCP, as for :class:`TapPort`.
    """

    def __init__(self, where: str | os.PathLike[str], *, client: bool = False, netns: str | None = None) -> None:
        """Listens, or starts to connect."""
        super().__init__(PortSpec.of("stream", str(where), client=client, netns=netns))


class DgramPort(Port):
    """A socket that frames go through, a datagram each: QEMU's ``-netdev dgram``, or another such port.

    Args:
        where: where to receive: a unix socket's path, or an IP address and a UDP port (``127.0.0.1:5000``).
        remote: where the other end receives, of the same kind.
        netns: the network namespace for UDP, as for :class:`TapPort`.
    """

    def __init__(
        self, where: str | os.PathLike[str], *, remote: str | os.PathLike[str], netns: str | None = None
    ) -> None:
        """Opens the socket."""
        super().__init__(PortSpec.of("dgram", str(where), remote=str(remote), netns=netns))


class AfXdpPort(Port):
    """A network interface of the host, taken away from its network stack: an uplink by AF_XDP.

    A program on the interface hands what arrives to this port, and the host sees none of it; with the port, or with the
    process, the program is gone. Needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF, and Linux 5.9. Frames are whole on both
    sides: an interface whose other end leaves checksums to be done (a veth pair) must not (``ethtool -K PEER tx off``),
    and tags of VLANs must stay in frames (``ethtool -K INTERFACE rxvlan off``).

    Args:
        interface: the interface.
        queues: how many of its receive queues to take, from the first on; all of them if not given. What arrives on
            others stays with the host. In a network each worker has some of them.
        ring_size: entries of each ring, a power of two from 8 to 32768; 4096 bytes of locked memory each, twice for the
            queue of a worker that sends.
        mode: ``copy`` has the kernel copy, ``zero-copy`` the card share the port's memory or fail, ``auto`` whichever
            works. (Virtio cards of guests share it in Linux newer than 6.12, with ``iommu_platform=on`` and where they
            can reset a ring, which those of vhost-user back-ends cannot.)
        attach: ``native`` has the driver hand packets over, ``generic`` the network stack behind it (slower, for every
            driver), ``auto`` whichever works.
        promiscuous: receive frames for other stations too, as whoever bridges has to.
        netns: the network namespace that it is in, as for :class:`TapPort`.
    """

    def __init__(
        self,
        interface: str,
        *,
        queues: int | None = None,
        ring_size: int = 2048,
        mode: Literal["auto", "copy", "zero-copy"] = "auto",
        attach: Literal["auto", "native", "generic"] = "auto",
        promiscuous: bool = True,
        netns: str | None = None,
    ) -> None:
        """Attaches to the interface."""
        options = {
            "queues": queues,
            "ring_size": ring_size,
            "mode": mode,
            "attach": attach,
            "promiscuous": promiscuous,
            "netns": netns,
        }
        super().__init__(PortSpec.of("af-xdp", interface, **options))


class UserNetPort(Port):
    """A network of its own with a gateway to the outside: QEMU's user-mode networking, or passt, as a port.

    The gateway hands out addresses (DHCP, router advertisements), answers for names (its own table, what guests call
    themselves, ``gateway``; others it asks the host's name server for), answers ARP, neighbour discovery and echo
    requests, and carries TCP, UDP and echo requests to the outside by ordinary sockets of this user. No rights are
    needed, except for echo requests to the outside (``net.ipv4.ping_group_range``). It runs on a thread of its own.

    Guests reach what the host reaches, except the host's loopback and addresses that no router hands on. Up to 256 TCP
    connections, 256 UDP conversations and 32 series of echo requests are carried at a time; fragments are not.

    Args:
        network: the guests' IPv4 network, such as ``"10.0.2.0/24"``.
        gateway: the gateway's address, which is the name server's too: the second of the network if not given (the
            first where the prefix is longer than 27 bits).
        first: the first address for guests: the fifteenth if not given (the second).
        ipv6: the guests' IPv6 network, of 64 bits, or ``"off"``. Its second address is the gateway's.
        mac: the gateway's MAC address.
        mtu: bytes of an IP packet that guests are told to send at most, 576 to 65535, with IPv6 from 1280.
        lease_s: seconds that addresses are given for, from 10.
        outside: carry what is for the outside; if not, the gateway only answers, and forwarded ports work.
        host_loopback: have the gateway's address lead to servers on the host's own loopback.
        resolver: the name server to ask; the first of ``/etc/resolv.conf`` if not given.
        domain: the domain that guests are told they are in.
        names: names and their addresses.
        leases: addresses of stations by MAC address: an address, or an address and the name the station gets.
        forward: ports of the host that lead to guests: ``{8080: ("10.0.2.15", 80), "udp/0.0.0.0:53": "10.0.2.15:53"}``.
            A port alone is one of the host's loopback, port 0 one that the system chooses (:attr:`listening`).
        tcp_idle_s: seconds without a packet after which a connection is given up.
        udp_idle_s: the same for UDP and echo requests.

    Raises:
        ConfigError: addresses that do not fit together.
        PortError: a port of the host is taken.
    """

    def __init__(
        self,
        network: str = "10.0.2.0/24",
        *,
        gateway: str | None = None,
        first: str | None = None,
        ipv6: str | None = None,
        mac: str | None = None,
        mtu: int = 1500,
        lease_s: int = 86400,
        outside: bool = True,
        host_loopback: bool = False,
        resolver: str | None = None,
        domain: str | None = None,
        names: Mapping[str, str] | None = None,
        leases: Mapping[str, str | tuple[str, str]] | None = None,
        forward: Mapping[int | str, str | tuple[str, int]] | None = None,
        tcp_idle_s: int = 7200,
        udp_idle_s: int = 60,
    ) -> None:
        """Makes the network."""
        options = {name: value for name, value in locals().items() if name not in {"self", "network", "__class__"}}
        super().__init__(PortSpec.of("user-net", network, **options))

    @property
    def leases(self) -> tuple[Lease, ...]:
        """The addresses that guests have."""
        return self._user_net.leases

    @property
    def listening(self) -> dict[str, str]:
        """Where the host listens for each forwarded port, by how it was specified."""
        return listening(self.spec, self._user_net)

    @property
    def _user_net(self) -> UserNetStats:
        from virtnet.stats import UserNetStats

        return self.stats().user_net or UserNetStats()


def listening(spec: PortSpec, stats: UserNetStats) -> dict[str, str]:
    """Where the host listens for each forwarded port of a specification."""
    return dict(zip(spec.options["forward"], stats.listening, strict=False))


class PcapPort(Port):
    """A capture file: what is sent is written, or what was written is received.

    Args:
        path: the file.
        mode: ``write`` or ``read``.
        overwrite: write over a file that exists.
        loop: read the file again and again.
        timed: wait between packets as long as was recorded, instead of reading as fast as possible.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Literal["write", "read"] = "write",
        overwrite: bool = False,
        loop: bool = False,
        timed: bool = False,
    ) -> None:
        """Opens the file."""
        super().__init__(PortSpec.of("pcap", str(path), mode=mode, overwrite=overwrite, loop=loop, timed=timed))


class MemoryPort(Port):
    """One of two ports back to back; see :func:`memory_pair`."""


def memory_pair(*, capacity: int = 1024) -> tuple[MemoryPort, MemoryPort]:
    """Two ports back to back in this process: what one sends the other receives.

    Args:
        capacity: packets that may be on their way in each direction.

    Example:
        >>> a, b = memory_pair()
        >>> a.tx([bytes(60)])
        1
        >>> b.rx()
        <Burst of 1 packets, 60 bytes>
    """
    spec = PortSpec.of("memory", "pair", capacity=capacity)
    left, right = _virtnet.memory_pair(spec.options["capacity"])
    return MemoryPort(spec, left), MemoryPort(spec, right)


_CLASSES: dict[str, type[Port]] = {
    "vhost-user": VhostUserPort,
    "virtio-user": VirtioUserPort,
    "tap": TapPort,
    "af-packet": AfPacketPort,
    "af-xdp": AfXdpPort,
    "vxlan": VxlanPort,
    "stream": StreamPort,
    "dgram": DgramPort,
    "pcap": PcapPort,
    "user-net": UserNetPort,
}


def open_port(spec: str | PortSpec) -> Port:
    """Opens the port of a textual form: ``open_port("virtio-user:vm1.sock,ring=packed")``.

    Raises:
        ConfigError: the text is no port, or a memory port, which :func:`memory_pair` makes.
        PortError: the system refused.
    """
    if isinstance(spec, str):
        spec = PortSpec.parse(spec)
    if spec.kind not in _CLASSES:
        raise ConfigError(f"{spec} cannot be opened alone: memory_pair() makes two ports back to back")
    cls = _CLASSES[spec.kind]
    port = cls.__new__(cls)
    Port.__init__(port, spec)
    return port


def describe(stats: PortStats) -> str:
    """The state of a port in a few words."""
    parts: list[Any] = []
    if stats.kind in {"vhost-user", "virtio-user", "stream", "dgram"}:
        why = f" ({stats.last_error})" if stats.last_error else ""
        parts.append("connected" if stats.connected else f"nobody there{why}")
        if stats.link_up is False:
            parts.append("link down")
        if stats.ring:
            pairs = f"{stats.queue_pairs} queue pair{'s' if stats.queue_pairs != 1 else ''}"
            parts.append(f"{stats.ring}, {pairs}")
    if stats.link_up is not None and stats.kind in {"tap", "af-packet", "af-xdp"}:
        parts += ["link up" if stats.link_up else stats.last_error or "link down"]
        parts += [stats.xdp] if stats.xdp else []
    if stats.kind == "pcap" and stats.state == "waiting":
        parts.append("nobody reads it yet")
    if stats.kind == "pcap" and stats.state == "ended":
        parts.append(f"ended ({stats.last_error})")
    if net := stats.user_net:
        parts += [f"{len(net.leases)} leases", f"{net.tcp_flows + net.udp_flows + net.ping_flows} flows"]
    parts += [f"{stats.received} received", f"{stats.sent} sent"]
    if dropped := sum(stats.drops.values()):
        parts.append(f"{dropped} dropped")
    return ", ".join(parts)
