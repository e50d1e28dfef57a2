"""Composing with traffic for measurements: generators of streams, and analysers that say what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsBytes, cast

from virtnet.description import FunctionSpec, check_options, whole
from virtnet.drawing import Drawing
from virtnet.errors import ConfigError
from virtnet.generating import stream_tables
from virtnet.streams import STREAM_IDS, Stream

if TYPE_CHECKING:
    from virtnet.generating import Analyser, Generator
    from virtnet.nodes import Node

__all__ = ["TrafficMethods"]


class TrafficMethods(Drawing):
    """The part of :class:`~virtnet.Net` that adds generators and analysers."""

    def generator(
        self,
        *streams: Stream | bytes | bytearray | SupportsBytes,
        rate_pps: float | None = None,
        rate_bps: float | None = None,
        burst: int | None = None,
        count: int | None = None,
        size: int | None = None,
        to: Node | None = None,
        first_id: int | None = None,
        name: str | None = None,
    ) -> Generator:
        """Adds a generator, which sends streams of packets that an :meth:`analyser` recognises.

        With one cable it sends there. It may also stand in a cable: what it makes goes to the node ``to``, and what
        comes in at one end leaves by the other, so ``analyser >> net.generator(to=port)`` sends to a port and analyses
        what comes back.

        Behind the headers of each packet (of Ethernet, VLANs, IP, and TCP, UDP or ICMP), or where the payload of
        anything else begins, stand 18 bytes, big-endian: 0x766e, the number of the stream (16 bits), the number of the
        packet in it (48), when it was sent by CLOCK_MONOTONIC in ns (48), and a word that makes their one's complement
        sum 0, so that checksums over them stay. A UDP checksum of 0 over IPv4 stays 0. The shortest UDP packet over
        IPv4 that has the room has 60 bytes.

        A stream with a rate sends when it is time, and what its port has no room for is dropped there as ``no_room``;
        without one it sends what its receiver takes. Up to two milliseconds of packets are made up for when the worker
        was late. With ``generator.set(rate_pps=...)`` and the like it changes in place, and numbers go on.

        Args:
            streams: 1 to 64 streams, or frames to make streams of; one of UDP packets to port 9 if not given.
            rate_pps: packets a second of each stream that says nothing of it.
            rate_bps: bits of frames a second, likewise.
            burst: packets that leave together, likewise.
            count: packets in all, likewise.
            size: bytes of each frame, of streams that have none.
            to: the node at the other end, whose cable is plugged in here.
            first_id: number of the first stream, others follow it; those of one network do not meet if not given.
            name: what to call it.

        Raises:
            ConfigError: a stream makes no sense; the message says which one.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     flows = vn.Stream(size=128, count=100, vary={"ip_src": vn.Counter("10.0.0.1", count=50)})
            ...     generator, port = net.generator(flows), net.memory("port")
            ...     _ = generator >> port
            ...     burst = port.end.rx(timeout_s=5)
            ...     print(len(set(burst.columns.ip_src.tolist())))
            50
        """
        said = {"rate_pps": rate_pps, "rate_bps": rate_bps, "burst": burst, "count": count, "size": size}
        tables = []
        for table in stream_tables(streams or [Stream()]):
            has_rate = "rate_pps" in table or "rate_bps" in table
            own = {"rate_pps", "rate_bps"} if has_rate else set()
            own |= {"size"} if "frame" in table else set()
            more = {key: one for key, one in said.items() if one is not None and key not in own}
            tables.append(more | table)
        with self.change():
            options = {
                "streams": tables,
                "first_id": self._free_id() if first_id is None else first_id,
                "to": "" if to is None else self._known(to.name).handle.name,
            }
            check_options(whole(FunctionSpec("generator", options)))
            generator = cast("Generator", self._function(name, FunctionSpec("generator", options)))
            if to is not None:
                self.cable(generator, to)
        return generator

    def analyser(self, *, check: bool = False, name: str | None = None) -> Analyser:
        """Adds an analyser, a sink that recognises packets of generators and counts what became of each stream.

        It tells losses, reordered packets and duplicates from each other within the last 65_536 numbers of a stream, of
        1024 streams at most, and how long packets were on their way: see :meth:`Analyser.report`.

        Args:
            check: look at checksums of IPv4, TCP, UDP and ICMP as well, and count what is wrong as ``corrupted``; the
                signature has a check of its own in any case.
            name: what to call it.
        """
        return cast("Analyser", self._function(name, FunctionSpec("analyser", {"check": bool(check)})))

    def _free_id(self) -> int:
        """The first number behind those of all streams there are."""
        nodes = (node.spec for node in self._plan.nodes.values())
        ends = [
            spec.options["first_id"] + len(spec.options["streams"])
            for spec in nodes
            if isinstance(spec, FunctionSpec) and spec.kind == "generator"
        ]
        if (free := max(ends, default=0)) >= STREAM_IDS:
            raise ConfigError(f"streams have numbers up to {STREAM_IDS - 1}, all are taken: give a first_id")
        return free
