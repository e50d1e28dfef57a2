"""Composing with routers: the functions that know IP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from virtnet.description import FunctionSpec
from virtnet.given import by_name, table, texts
from virtnet.nodes import Function, Node, Router

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    #: What may be said of an interface: an address with its prefix, several, or a table.
    Interface = str | Sequence[str] | Mapping[str, Any]

__all__ = ["RouterMethods"]


class RouterMethods:
    """The methods of :class:`~virtnet.Net` that add routers."""

    def _function(self, name: str | None, spec: FunctionSpec) -> Function:
        raise NotImplementedError

    def router(
        self,
        interfaces: Mapping[str | Node, Interface] | None = None,
        routes: Mapping[str, str] | None = None,
        *,
        errors_pps: int = 1000,
        name: str | None = None,
    ) -> Router:
        """Adds a router, which sends IP packets from cable to cable by the longest prefix of where they go.

        It finds stations by ARP and neighbour discovery, answers pings to its own addresses, tells senders of errors by
        ICMP, and cuts IPv4 packets that are longer than the next link's MTU into fragments where they may be. Frames
        that a guest leaves to be cut into segments pass as they are; what a frame has behind its packet (padding, a
        trailer) is taken off. It serves nothing itself: what else is for its own addresses is refused as by a host
        whose ports are closed, by ICMP (port or protocol unreachable, unknown header) or a reset of TCP.

        Args:
            interfaces: by the node at the far end of each cable, the router's addresses there with their prefixes, or a
                table: ``addresses``; ``mac``, made from the first address if not given; ``mtu``, 1500 if not given, at
                least 1280 where there is an IPv6 address.
            routes: by prefix, over whom: the next router's address, ``ADDRESS%NODE`` where that is one of a link
                (``fe80::1%wan``), or the node whose link it is. Prefixes of interfaces are routes already.
            errors_pps: ICMP errors and resets of TCP that it sends per second at most.
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> lan, wan = net.switch(name="lan"), net.memory("wan")
            >>> router = net.router({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, {"0.0.0.0/0": "192.0.2.1"})
            >>> _ = lan >> router << wan
            >>> router.route("10.9.0.0/16", "192.0.2.9")

        Raises:
            ConfigError: an address, a prefix or a next router makes no sense; the message says which one.
        """
        options = {"interfaces": by_name(interfaces), "routes": table(routes), "errors_pps": errors_pps}
        return cast("Router", self._function(name, FunctionSpec("router", options)))

    def nat(
        self,
        interfaces: Mapping[str | Node, Interface] | None = None,
        routes: Mapping[str, str] | None = None,
        *,
        outside: str | Node | Sequence[str | Node] = (),
        pool: Sequence[str] = (),
        forward: Mapping[str, str] | None = None,
        prefixes: Mapping[str, str] | None = None,
        flows_max: int = 65_536,
        errors_pps: int = 1000,
        name: str | None = None,
    ) -> Router:
        """Adds a router that translates IPv4 addresses: what leaves to the outside gets a source of the router's there.

        A flow keeps its port where that is free. Its answers, and ICMP errors about it, find back; what else comes
        from outside is for services that are forwarded, or for the router itself, or is dropped (``no_mapping``).
        Stations inside reach services by their outer address as well.

        IPv6 is routed as it is, but for ``prefixes`` (NPTv6, RFC 6296): an address inside is one outside then, and the
        other way round. Nothing is remembered, ports and checksums stay as they are, and everybody outside may begin:
        where that is not wanted, put a :meth:`~virtnet.Net.firewall` before it. The network outside has to have a route
        to the prefix over this router, which does not answer for it by neighbour discovery. Addresses that cannot be
        translated (subnet ``ffff`` of a prefix up to /48, an interface identifier of all ones behind a longer one) are
        told so and dropped (``no_mapping``).

        Flows are remembered until nothing is heard of them for 2 h 4 min (TCP that is open), 4 min (that opens or
        closes), 5 min (UDP), 1 min (pings), 10 min (others). Beyond ``flows_max`` new ones are dropped
        (``table_full``).

        Fragments go where the first of their packet went, which has the ports. Those that come before it wait for it,
        at most 2 s and within bounds (512 packets, 4 MiB), and are then dropped (``fragment``).

        Args:
            interfaces: as for :meth:`router`.
            routes: likewise.
            outside: the node, or the nodes, whose cables lead outside.
            pool: addresses that flows are seen by outside; a station keeps to one. The router's own if there are none.
            forward: by service (``"tcp:192.0.2.2:8080"``, or ``"tcp:8080"`` for the router's addresses outside), who
                inside serves it (``"10.0.0.5:80"``).
            prefixes: by IPv6 prefix inside (``"fd00:1::/48"``), the one it is outside (``"2001:db8:1::/48"``); 1 to 64
                bits, where they differ in length the shorter one is filled up with zeros.
            flows_max: flows that are translated at a time.
            errors_pps: as for :meth:`router`.
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> lan, wan = net.switch(name="lan"), net.memory("wan")
            >>> gateway = net.nat(
            ...     {lan: "10.0.0.1/24", wan: "192.0.2.2/24"},
            ...     {"0.0.0.0/0": "192.0.2.1"},
            ...     outside=wan,
            ...     forward={"tcp:8080": "10.0.0.5:80"},
            ... )
            >>> _ = lan >> gateway << wan
            >>> gateway.set(forward={})

        Raises:
            ConfigError: an option makes no sense; the message says which one.
        """
        ends = [outside] if isinstance(outside, Node) else texts(outside)
        options = {
            "interfaces": by_name(interfaces),
            "routes": table(routes),
            "outside": [end.name if isinstance(end, Node) else end for end in ends] if isinstance(ends, list) else ends,
            "pool": texts(pool),
            "forward": table(forward),
            "prefixes": table(prefixes),
            "flows_max": flows_max,
            "errors_pps": errors_pps,
        }
        return cast("Router", self._function(name, FunctionSpec("nat", options)))

    def load_balancer(
        self,
        interfaces: Mapping[str | Node, Interface] | None = None,
        routes: Mapping[str, str] | None = None,
        *,
        services: str | Sequence[str] = (),
        backends: Sequence[str] = (),
        flows_max: int = 65_536,
        errors_pps: int = 1000,
        name: str | None = None,
    ) -> Router:
        """Adds a router that shares flows to a service out among back-ends.

        Which one a flow gets follows from its addresses and ports alone, by consistent hashing (Maglev): when back-ends
        come or go, new flows of the others stay where they were, but for a few. Flows that have begun stay with their
        back-end whatever happens: ``balancer.set(backends=[...])`` is for a program that watches their health.
        Back-ends see their clients' addresses, and have the balancer as their router on the way back.

        Args:
            interfaces: as for :meth:`router`.
            routes: likewise.
            services: what is asked for, such as ``"tcp:192.0.2.10:80"``; one, or several with the same back-ends.
            backends: who serves it, such as ``"10.0.0.5:80"``.
            flows_max: flows that are remembered at a time; beyond that new ones are dropped (``table_full``).
            errors_pps: as for :meth:`router`.
            name: what to call it.

        Example:
            >>> import virtnet as vn
            >>> net = vn.Net()
            >>> wan, farm = net.memory("wan"), net.switch(name="farm")
            >>> balancer = net.load_balancer(
            ...     {wan: "192.0.2.10/24", farm: "10.0.0.1/24"},
            ...     services="tcp:192.0.2.10:80",
            ...     backends=["10.0.0.5:80", "10.0.0.6:80"],
            ... )
            >>> _ = wan >> balancer << farm
            >>> balancer.set(backends=["10.0.0.6:80"])

        Raises:
            ConfigError: an option makes no sense; the message says which one.
        """
        options = {
            "interfaces": by_name(interfaces),
            "routes": table(routes),
            "services": texts(services),
            "backends": texts(backends),
            "flows_max": flows_max,
            "errors_pps": errors_pps,
        }
        return cast("Router", self._function(name, FunctionSpec("load_balancer", options)))
