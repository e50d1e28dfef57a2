"""What a network is made of, as a program holds it: ports and functions.

A node is a name in its network. Making one is the network's business (``net.vhost_user(...)``, ``net.switch()``);
joining them is done with ``>>`` and ``<<``.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from virtnet.commanding import DeviceCommands
from virtnet.errors import ConfigError, StateError
from virtnet.events import events_of, wait_for_event
from virtnet.explaining import Explanation, explain
from virtnet.ports import describe, listening
from virtnet.spec import is_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtnet.description import FunctionSpec
    from virtnet.events import Event, Events
    from virtnet.net import Net
    from virtnet.ports import MemoryPort
    from virtnet.spec import PortSpec
    from virtnet.stats import FunctionStats, Lease, PortStats, RingState, RuleStats

    Other = TypeVar("Other", bound="Node")

__all__ = ["Device", "Firewall", "Function", "Node", "PortNode", "QemuArgs", "Router", "Switch"]


class Node:
    """A port or a function of a network.

    Attributes:
        net: the network.
        name: its name there.
        kind: what it is.
    """

    def __init__(self, net: Net, name: str, kind: str) -> None:
        """Made by the network."""
        self.net = net
        self.name = name
        self.kind = kind

    def __rshift__(self, other: Other) -> Other:
        """Plugs in a cable to ``other``, which it gives back."""
        if not isinstance(other, Node):
            return NotImplemented
        self.net.cable(self, other)
        return other

    def __lshift__(self, other: Node) -> Node:
        """Plugs in a cable to ``other``; gives back this node."""
        if not isinstance(other, Node):
            return NotImplemented
        self.net.cable(self, other)
        return self

    def remove(self) -> None:
        """Takes it out of the network, with its cables."""
        self.net.remove(self)

    @property
    def state(self) -> str:
        """How it is, in a few words."""
        if self.name not in self.net:
            return "removed"
        return "running" if self.net.running else "not running"

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same node."""
        return isinstance(other, Node) and (self.net, self.name) == (other.net, other.name)

    def __hash__(self) -> int:
        """By network and name."""
        return hash((id(self.net), self.name))

    def __repr__(self) -> str:
        """What it is and how it is."""
        return f"<{self.kind} {self.name!r}: {self.state}>"


class Function(Node):
    """A network function: what happens to packets between ports.

    Attributes:
        spec: what it is to be.
    """

    def __init__(self, net: Net, name: str, spec: FunctionSpec) -> None:
        """Made by the network."""
        super().__init__(net, name, spec.kind)
        self.spec = spec

    def set(self, **options: Any) -> None:
        """Changes options of it, in place where its kind can, such as ``switch.set(ageing_s=60)``.

        What else is changed makes it anew: what it has learnt and counted is lost.

        Raises:
            ConfigError: its kind has no such option, or the value is none.
        """
        self.net._set(self, options)  # noqa: SLF001 - the network holds what runs

    def stats(self) -> FunctionStats:
        """What it did so far."""
        from virtnet.stats import FunctionStats

        return self.net.stats().functions.get(self.name, FunctionStats(self.kind))


class Switch(Function):
    """A learning switch; see :meth:`Net.switch() <virtnet.Net.switch>`. Cables are named by who is at their far end."""

    def cable(self, node: Node | str, **options: Any) -> None:
        """Sets options of the cable to ``node``, now or for when it is plugged in; ``None`` takes one back.

        Wires, tees (those of captures, too) and firewalls in the cable do not count: the node past them names it.

        Options:

            access: the VLAN of its frames, which have no tag there.
            trunk: VLANs whose frames have a tag there: numbers, ranges such as ``"20-29"``, ``"all"``.
            native: the VLAN of a trunk's frames without a tag; without one these are dropped.
            isolated: kept apart from all other cables that are isolated.
            group: kept apart from all other cables of the same group (split horizon).
            learning: false for not learning who is there.
            broadcast_pps, multicast_pps, unknown_pps: packets per second that may come from there for everybody, for a
                group, for a station that is not known. Each worker counts by itself; a tenth of a second may be late.
            bond: cables of the same bond are one cable; each flow keeps to one of them.
            mirror: the node (by its cable to this switch) that gets a copy of all that passes here, either way, and
                nothing else.
            stations: MAC addresses that are there whatever is heard, with their VLAN where there are VLANs:
                ``"10/02:00:00:00:00:01"``.

        Args:
            node: who is at the far end, or that one's name.
            **options: those above.

        Raises:
            ConfigError: an option makes no sense; the message says which one.
        """
        name = node.name if isinstance(node, Node) else node
        options = {option: value.name if isinstance(value, Node) else value for option, value in options.items()}
        tables: dict[str, dict[str, Any]] = dict(self.spec.options["cables"])
        table = tables.get(name, {}) | options
        tables[name] = {option: value for option, value in table.items() if value is not None}
        self.set(cables=tables)

    def access(self, node: Node | str, vlan: int) -> None:
        """Puts the cable to ``node`` into one VLAN, whose frames have no tag there."""
        self.cable(node, access=vlan, trunk=None, native=None)

    def trunk(self, node: Node | str, vlans: Iterable[int | str] = ("all",), *, native: int | None = None) -> None:
        """Has the cable to ``node`` carry several VLANs with their tags, ``native`` without one."""
        self.cable(node, trunk=list(vlans), native=native, access=None)

    def isolate(self, *nodes: Node | str) -> None:
        """Keeps the cables to these nodes, and all that are isolated already, apart from each other."""
        with self.net.change():
            for node in nodes:
                self.cable(node, isolated=True)

    def mirror(self, node: Node | str, to: Node | str | None) -> None:
        """Copies all that passes the cable to ``node`` to another node; to ``None``: not any more."""
        self.cable(node, mirror=to)


class Device(DeviceCommands):
    """The device at the other end of a port of a network."""

    def __init__(self, port: PortNode) -> None:
        """Made by the port."""
        self.port = port
        self.spec = port.spec

    def stats(self) -> PortStats:
        """What has passed the port so far."""
        return self.port.stats()

    def _command(self, name: str, **arguments: Any) -> None:
        self.port.net._command(self.port, name, arguments)  # noqa: SLF001 - the network holds what runs

    def _ask_stats(self, asked: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        return self.port.net._device_stats(self.port, asked)  # noqa: SLF001 - the same

    def _device_state(self, state: bytes | None) -> bytes:
        return self.port.net._device_state(self.port, state)  # noqa: SLF001 - the same


class Firewall(Function):
    """A firewall; see :meth:`Net.firewall() <virtnet.Net.firewall>`."""

    @property
    def rules(self) -> tuple[RuleStats, ...]:
        """What each rule has counted, in order; last, without a text, what none matched."""
        from virtnet.stats import RuleStats

        return tuple(RuleStats(**rule) for rule in self.stats().detail.get("rules", ()))

    def add(self, name: str, *addresses: str) -> None:
        """Adds addresses and prefixes to a set, which begins with them if there is none of that name."""
        sets = dict(self.spec.options["sets"])
        self.set(sets=sets | {name: [*sets.get(name, ()), *addresses]})

    def discard(self, name: str, *addresses: str) -> None:
        """Takes addresses and prefixes, as they are written, out of a set."""
        sets = dict(self.spec.options["sets"])
        self.set(sets=sets | {name: [one for one in sets.get(name, ()) if one not in set(addresses)]})

    def take_out(self) -> None:
        """Removes it, and joins again what it stood between."""
        with self.net.change():
            self.net._take_out(self)  # noqa: SLF001 - the network holds what there is


class Router(Function):
    """A router; see :meth:`Net.router() <virtnet.Net.router>`. Interfaces are named by who is at their far end.

    ``router.set(routes={...})`` changes all routes at once, in place: stations that are known stay known.
    """

    def interface(self, node: Node | str, addresses: str | Iterable[str], **options: Any) -> None:
        """Gives the cable to ``node`` an interface, or another one.

        Args:
            node: who is at the far end, or that one's name.
            addresses: the router's addresses there with their prefixes, such as ``"10.0.0.1/24"``.
            **options: ``mac`` and ``mtu``.

        Raises:
            ConfigError: one of them makes no sense; the message says which one.
        """
        name = node.name if isinstance(node, Node) else node
        given = [addresses] if isinstance(addresses, str) else list(addresses)
        self.set(interfaces={**self.spec.options["interfaces"], name: {"addresses": given, **options}})

    def route(self, prefix: str, via: str | Node) -> None:
        """Adds a route, or changes where it leads.

        Raises:
            ConfigError: it makes no sense.
        """
        hop = via.name if isinstance(via, Node) else via
        self.set(routes={**self.spec.options["routes"], prefix: hop})

    def unroute(self, prefix: str) -> None:
        """Takes a route away.

        Raises:
            ConfigError: there is none.
        """
        routes = dict(self.spec.options["routes"])
        if prefix not in routes:
            raise ConfigError(f"{self.name!r} has no route to {prefix!r}")
        del routes[prefix]
        self.set(routes=routes)


class PortNode(Node):
    """A port of a network.

    Attributes:
        spec: what it is to be.
        end: of a memory port, the other end, to be used by hand.
    """

    def __init__(self, net: Net, name: str, spec: PortSpec) -> None:
        """Made by the network."""
        super().__init__(net, name, spec.kind)
        self.spec = spec
        self.end: MemoryPort | None = None

    def stats(self) -> PortStats:
        """What has passed so far, and what was agreed with the other end."""
        from virtnet.stats import PortStats

        return self.net.stats().ports.get(self.name, PortStats(self.kind))

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Of a user-mode network, the addresses that its guests have."""
        net = self.stats().user_net
        return net.leases if net else ()

    @property
    def listening(self) -> dict[str, str]:
        """Of a user-mode network, where the host listens for each forwarded port, by how it was specified."""
        net = self.stats().user_net
        return listening(self.spec, net) if net else {}

    @property
    def connected(self) -> bool:
        """Whether somebody is at the other end now."""
        return self.net.running and self.stats().connected

    def wait_connected(self, timeout_s: float | None = None) -> bool:
        """Waits until somebody is at the other end and ready for packets; whether that happened in time.

        Raises:
            StateError: the network does not run, or the port was removed.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.connected:
            if not self.net.running or self.name not in self.net:
                raise StateError(f"nobody can attach to {self.name!r}: it is {self.state}")
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def set_link(self, up: bool) -> None:
        """Takes the link of a vhost-user port down, or up again, as :meth:`~virtnet.VhostUserPort.set_link`.

        Raises:
            StateError: the network does not run, or the port was removed.
            ConfigError: this is no vhost-user port.
        """
        self.net._set_link(self, up)  # noqa: SLF001 - the network holds what runs

    @property
    def device(self) -> Device:
        """The device at the other end of a virtio-user port, to be asked for things through its control queue.

        Raises:
            ConfigError: this is no virtio-user port.
        """
        if self.kind != "virtio-user":
            raise ConfigError(f"{self.name!r} is a {self.kind} port, only a virtio-user port has a device to ask")
        return Device(self)

    @property
    def state(self) -> str:
        """How it is, in a few words."""
        state = super().state
        return describe(self.stats()) if state == "running" else state

    @property
    def events(self) -> Events:
        """What has happened since the port was opened; stays readable when the network is stopped."""
        return events_of(self._read_events)

    def wait_event(self, kind: str, timeout_s: float | None = None, *, since: int = 0) -> Event | None:
        """Waits for an event; see :meth:`virtnet.Port.wait_event`."""
        return wait_for_event(self._read_events, kind, timeout_s, since)

    def _read_events(self, first: int) -> tuple[list[dict[str, Any]], int]:
        return self.net._events(self.name, first)  # noqa: SLF001 - a part of the network

    @property
    def rings(self) -> tuple[RingState, ...]:
        """How its rings stand, in order of their numbers; none where there are no rings."""
        from virtnet.stats import RingState

        return tuple(RingState(**ring) for ring in self.net._rings(self.name))  # noqa: SLF001 - the same

    def explain(self) -> Explanation:
        """How the port stands, in words: how far the other end has come, what was agreed on, what is missing.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     print(net.vhost_user("/tmp/virtnet-doc.sock").explain().state)
            Nobody has connected to /tmp/virtnet-doc.sock yet.
        """
        return explain(self.stats(), self.spec, runs=super().state == "running", rings=self.rings)

    def qemu_args(self, *, memory: str = "512M", mac: str | None = None, packed: bool = False) -> QemuArgs:
        """The arguments for QEMU that put a network card on the other end of this port.

        Args:
            memory: the guest's memory, which a vhost-user port has to share; others leave it to you.
            mac: the guest's MAC address, if not given that of the port, or QEMU's choice.
            packed: ask the guest's driver for packed rings.

        Returns:
            A list for :mod:`subprocess`; printed, a line for a shell.

        Raises:
            ConfigError: this is no vhost-user, stream or dgram port.

        Example:
            >>> import virtnet as vn
            >>> print(vn.Net().vhost_user("/run/vm1.sock").qemu_args(memory="1G")[:4])
            ['-m', '1G', '-object', 'memory-backend-memfd,id=memory,size=1G,share=on']
            >>> print(vn.Net().stream("/run/vm1.sock").qemu_args()[1])
            stream,id=net0,server=off,reconnect-ms=1000,addr.type=unix,addr.path=/run/vm1.sock
        """
        options = self.spec.options
        device = ["virtio-net-pci", "netdev=net0"]
        device += [f"mac={mac}"] if (mac := mac or options.get("mac")) else []
        if self.kind in {"stream", "dgram"}:
            device += ["packed=on"] if packed else []
            return QemuArgs(["-netdev", _socket_netdev(self.spec), "-device", ",".join(device)])
        if self.kind != "vhost-user":
            raise ConfigError(
                f"QEMU attaches to vhost-user, stream and dgram ports, and {self.name!r} is a {self.kind} port"
            )
        pairs = options["queue_pairs"]
        # As client QEMU comes back by itself when this end was restarted; as server it waits here for us.
        chardev = "server=on,wait=off" if options["client"] else "reconnect-ms=1000"
        queues = f",queues={pairs}" if pairs > 1 else ""
        # One vector for each queue, one for the control queue, one for changes of the configuration.
        device += ["mq=on", f"vectors={2 * pairs + 2}"] if pairs > 1 else []
        device += ["packed=on"] if packed else []
        device += [f"host_mtu={mtu}"] if (mtu := options["mtu"]) else []
        return QemuArgs(
            [
                "-m",
                memory,
                "-object",
                f"memory-backend-memfd,id=memory,size={memory},share=on",
                "-machine",
                "memory-backend=memory",
                "-chardev",
                f"socket,id=char0,path={_for_qemu(self.spec.where)},{chardev}",
                "-netdev",
                f"vhost-user,id=net0,chardev=char0{queues}",
                "-device",
                ",".join(device),
            ]
        )


def _for_qemu(path: str) -> str:
    """A path as QEMU's options take it."""
    return str(Path(path).absolute()).replace(",", ",,")


def _socket_netdev(spec: PortSpec) -> str:
    """QEMU's netdev at the other end of a port on a socket."""

    def at(name: str, where: str) -> str:
        if is_path(where):
            return f"{name}.type=unix,{name}.path={_for_qemu(where)}"
        host, _, port = where.rpartition(":")
        return f"{name}.type=inet,{name}.host={host.strip('[]')},{name}.port={port}"

    if spec.kind == "dgram":
        return f"dgram,id=net0,{at('local', spec.options['remote'])},{at('remote', spec.where)}"
    role = "server=on" if spec.options["client"] else "server=off,reconnect-ms=1000"
    return f"stream,id=net0,{role},{at('addr', spec.where)}"


class QemuArgs(list[str]):
    """Arguments for QEMU: a list for :mod:`subprocess`, a line for a shell when printed."""

    def __str__(self) -> str:
        """The arguments, quoted for a shell."""
        return shlex.join(self)
