"""Adding ports to a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from virtnet.drawing import Drawing
from virtnet.feeding import IterablePort
from virtnet.nodes import PortNode
from virtnet.plans import planned
from virtnet.spec import PortSpec, is_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from virtnet.burst import Burst, Frame
    from virtnet.net import Net
    from virtnet.ports import Features

__all__ = ["AddingPorts"]


class AddingPorts(Drawing):
    """Adds ports, a method for each kind."""

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
        handle = PortNode(cast("Net", self), self._name(name, _called(spec)), spec)
        self._add(planned(handle, spec))
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
        rss: bool = False,
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
            "rss": rss,
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
        control: bool = False,
        hash_report: bool = False,
        iommu: bool = False,
        in_flight: bool = True,
        in_band: bool = False,
        without: Features | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds a driver that attaches to a vhost-user back-end; options as for :class:`~virtnet.VirtioUserPort`.

        What its device can be asked for with ``control=True`` are the methods of ``port.device``.
        """
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
        return self.port(PortSpec.of("virtio-user", str(path), **options), name=name)

    def tap(
        self,
        interface: str,
        *,
        mtu: int | None = None,
        queue_pairs: int = 1,
        netns: str | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds an interface of the kernel; options as for :class:`~virtnet.TapPort`."""
        return self.port(PortSpec.of("tap", interface, mtu=mtu, queue_pairs=queue_pairs, netns=netns), name=name)

    def af_packet(
        self,
        interface: str,
        *,
        queues: int = 1,
        promiscuous: bool = True,
        netns: str | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds an interface of the host that is there already; options as for :class:`~virtnet.AfPacketPort`."""
        spec = PortSpec.of("af-packet", interface, queues=queues, promiscuous=promiscuous, netns=netns)
        return self.port(spec, name=name)

    def vxlan(
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
        name: str | None = None,
    ) -> PortNode:
        """Adds a way to other hosts, over UDP; options as for :class:`~virtnet.VxlanPort`."""
        options = {
            "vni": vni,
            "remotes": remotes if isinstance(remotes, str) else tuple(remotes),
            "learn": learn,
            "ageing_s": ageing_s,
            "anyone": anyone,
            "source_ports": source_ports,
            "netns": netns,
        }
        return self.port(PortSpec.of("vxlan", local, **options), name=name)

    def stream(
        self,
        where: str | os.PathLike[str],
        *,
        client: bool = False,
        netns: str | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds a connection that frames go through; options as for :class:`~virtnet.StreamPort`."""
        return self.port(PortSpec.of("stream", str(where), client=client, netns=netns), name=name)

    def dgram(
        self,
        where: str | os.PathLike[str],
        *,
        remote: str | os.PathLike[str],
        netns: str | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds a socket that frames go through, a datagram each; options as for :class:`~virtnet.DgramPort`."""
        return self.port(PortSpec.of("dgram", str(where), remote=str(remote), netns=netns), name=name)

    def af_xdp(
        self,
        interface: str,
        *,
        queues: int | None = None,
        ring_size: int = 2048,
        mode: Literal["auto", "copy", "zero-copy"] = "auto",
        attach: Literal["auto", "native", "generic"] = "auto",
        promiscuous: bool = True,
        netns: str | None = None,
        name: str | None = None,
    ) -> PortNode:
        """Adds an interface taken away from the host's network stack; options as for :class:`~virtnet.AfXdpPort`."""
        options = {
            "queues": queues,
            "ring_size": ring_size,
            "mode": mode,
            "attach": attach,
            "promiscuous": promiscuous,
            "netns": netns,
        }
        return self.port(PortSpec.of("af-xdp", interface, **options), name=name)

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

    def user_net(
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
        name: str | None = None,
    ) -> PortNode:
        """Adds a gateway that gives guests addresses and names, and carries what they send to the outside without root.

        Options as for :class:`~virtnet.UserNetPort`. ``port.leases`` says who has which address.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> gateway = net.user_net("10.0.2.0/24", forward={8080: ("10.0.2.15", 80)})
            >>> vm = net.vhost_user("vm1.sock")
            >>> _ = vm >> net.switch() << gateway
            >>> print(gateway.spec)
            user-net:10.0.2.0/24,forward=8080/10.0.2.15:80
        """
        options = {option: value for option, value in locals().items() if option not in {"self", "network", "name"}}
        return self.port(PortSpec.of("user-net", network, **options), name=self._name(name, "gateway"))

    def memory(self, name: str, *, capacity: int = 1024) -> PortNode:
        """Adds a port whose other end, ``.end``, is a :class:`~virtnet.MemoryPort` for this program to use by hand."""
        return self.port(PortSpec.of("memory", name, capacity=capacity), name=name)

    def iterable(
        self, frames: Iterable[Frame | Burst], *, capacity: int = 1024, name: str | None = None
    ) -> IterablePort:
        """Adds a port that plays a Python iterable: its frames come into the network, in order, as soon as taken.

        The iterable is asked in a thread of its own, from when the network runs and the port is plugged in until it
        is at its end, the port is removed or the network stops; what it raises is the port's ``error``.

        Args:
            frames: frames, or bursts of them, which is faster. A generator is closed at the end.
            capacity: frames that may wait for the network; when there are so many, the iterable waits.
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     player, there = net.iterable(bytes([2] * 14) for _ in range(3)), net.memory("there")
            ...     _ = player >> there
            ...     _ = player.wait(5)
            ...     player.played, player.error
            (3, None)
        """
        chosen = self._name(name, "iterable")
        spec = PortSpec.of("memory", chosen, capacity=capacity)
        handle = IterablePort(cast("Net", self), chosen, spec, frames)
        self._add(planned(handle, spec))
        if cast("Net", self).running:
            handle._begin()  # noqa: SLF001 - a part of the network
        return handle


def _called(spec: PortSpec) -> str:
    """What to call a port of which nobody says it."""
    if spec.kind == "vxlan":
        return f"vxlan{spec.options['vni']}"
    is_address = spec.kind in {"stream", "dgram"} and not is_path(spec.where)
    return spec.kind if is_address else Path(spec.where).stem or spec.kind
