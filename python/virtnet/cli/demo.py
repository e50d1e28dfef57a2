"""``demo``: a switch and a few virtual machines in one process, without root.

The machines are drivers of virtio-net devices behind real vhost-user sockets, as QEMU's would be: they find each other
by ARP, ping each other, and then one pushes bulk traffic at another. At the end every packet is accounted for.
"""

from __future__ import annotations

import contextlib
import itertools
import json as json_
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virtnet import __version__
from virtnet.cli.hosts import Host, ipv4, resolve_all
from virtnet.cli.options import Json, Ring  # noqa: TC001 - Typer reads the annotations
from virtnet.cli.running import SAMPLE_S, Meter, interruptible
from virtnet.cli.tables import ports_table, rate, totals_line
from virtnet.errors import PeerGone
from virtnet.net import Net
from virtnet.ports import VirtioUserPort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from virtnet.nodes import PortNode
    from virtnet.stats import NetStats

__all__ = ["demo"]

N_MACHINES = 4
N_PINGS = 50
ATTACH_S = 10.0
SIZES = (64, 1518)


def demo(
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.5, max=600.0, help="How long to push bulk traffic.")
    ] = 8.0,
    ring: Ring = "split",
    json: Json = False,
) -> None:
    """Run a switch with virtual machines that ping and push bulk traffic, and account for every packet."""
    import tempfile

    from rich.console import Console

    console = Console(stderr=json)
    say = console.print
    with interruptible(), tempfile.TemporaryDirectory(prefix="virtnet-") as folder, Net() as net:
        switch = net.switch(name="switch")
        ports = [net.vhost_user(Path(folder, f"vm{i + 1}.sock")) for i in range(N_MACHINES)]
        for port in ports:
            net.cable(port, switch)

        pings = _meet(ports, ring, say)
        met = net.stats()
        bulk, machines, stats = _push(net, ports[0], ports[1], ring, seconds, console, quiet=json)

    exact = stats.balance().exact and machines.balance().exact and _agree(ports, met, stats, machines)
    if json:
        print(json_.dumps(_report(ring, pings, bulk, stats, machines, exact=exact)))
    else:
        _tell(console, pings, bulk, stats, exact=exact)
    if not exact:
        sys.exit(1)


def _meet(ports: list[PortNode], ring: Ring, say: Any) -> dict[str, Any]:
    """All machines attach, find each other and ping each other; round trips in microseconds."""
    with _hosts(ports, ring) as hosts:
        agreed = ports[0].stats()
        features = [*agreed.net_features.names(), *agreed.ring_features.names()]
        say(f"{len(hosts)} machines attached: {agreed.ring} rings; {', '.join(features)}")
        resolved = resolve_all(hosts)
        say("everybody knows everybody's MAC address" if resolved else "ARP was not answered")
        times: list[float] = []
        lost = 0
        pairs = list(itertools.permutations(hosts, 2)) if resolved else []
        numbers = itertools.count(1)
        for (host, other), _ in itertools.product(pairs, range(N_PINGS)):
            took = host.ping(other, next(numbers), hosts)
            if took is None:
                lost += 1
            else:
                times.append(took * 1e6)
        result = {"sent": len(times) + lost, "lost": lost, "resolved": resolved, **_percentiles(times)}
        say(f"{result['sent']} pings, {lost} lost")
        return result


def _push(
    net: Net, sender: PortNode, receiver: PortNode, ring: Ring, seconds: float, console: Console, *, quiet: bool
) -> tuple[list[dict[str, Any]], NetStats, NetStats]:
    """One machine sends to another as fast as it can, in small and then in large frames; rates, both ends' counters."""
    results = []
    with Net() as machines:
        vm1 = machines.virtio_user(sender.spec.where, ring=ring, name="vm1")
        vm2 = machines.virtio_user(receiver.spec.where, ring=ring, name="vm2")
        machines.cable(vm2, machines.sink(copy=True))
        for port in (vm1, vm2):
            if not port.wait_connected(ATTACH_S):
                raise PeerGone(f"{port.name} could not attach again within {ATTACH_S:g} s: {port!r}")
        with _table(net, console, quiet=quiet) as (meter, show):
            for size in SIZES:
                frame = _mac(1) + _mac(0) + b"\x08\x00" + ipv4(_ip(0), _ip(1), bytes(size - 34), 253)
                before, began = net.stats(), time.monotonic()
                source = machines.source(frame)
                vm1 >> source
                while (left := began + seconds / len(SIZES) - time.monotonic()) > 0:
                    net.wait(min(SAMPLE_S, left))
                    meter.sample(net.stats())
                    show()
                source.remove()
                after, took = net.stats(), time.monotonic() - began
                sent = after.ports[receiver.name].sent - before.ports[receiver.name].sent
                results.append({"size": size, "pps": sent / took, "bits_per_s": sent / took * size * 8})
        _settle(net, machines)
        return results, machines.stats(), net.stats()


def _settle(*nets: Net) -> None:
    """Waits until what is on its way has arrived."""
    before: list[NetStats] = []
    for _ in range(50):
        now = [net.stats() for net in nets]
        if now == before:
            return
        before = now
        time.sleep(0.1)


@contextlib.contextmanager
def _hosts(ports: list[PortNode], ring: Ring) -> Iterator[list[Host]]:
    """A machine on each port."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for i, port in enumerate(ports):
            driver = stack.enter_context(VirtioUserPort(port.spec.where, ring=ring))
            hosts.append(Host(port.name, _mac(i), _ip(i), driver))
        for host in hosts:
            if not host.port.wait_connected(ATTACH_S):
                raise PeerGone(f"{host.name} could not attach within {ATTACH_S:g} s: {host.port!r}")
        yield hosts


@contextlib.contextmanager
def _table(net: Net, console: Console, *, quiet: bool) -> Iterator[tuple[Meter, Any]]:
    """A live table of the switch's ports on a terminal."""
    from rich.live import Live

    meter = Meter()
    if quiet or not console.is_terminal:
        yield meter, lambda: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield meter, lambda: live.update(ports_table(net.stats(), meter.now, title="bulk traffic"), refresh=True)


def _agree(ports: list[PortNode], before: NetStats, after: NetStats, machines: NetStats) -> bool:
    """Whether both ends of the two sockets counted the same bulk packets."""
    sender, receiver = ports[0].name, ports[1].name
    arrived = after.ports[sender].received - before.ports[sender].received
    passed_on = after.ports[receiver].sent - before.ports[receiver].sent
    return machines.ports["vm1"].sent == arrived and machines.ports["vm2"].received == passed_on


def _report(
    ring: Ring, pings: dict[str, Any], bulk: list[dict[str, Any]], stats: NetStats, machines: NetStats, *, exact: bool
) -> dict[str, Any]:
    return {
        "virtnet": __version__,
        "command": "demo",
        "ring": ring,
        "pings": pings,
        "bulk": bulk,
        "exact": exact,
        "switch": stats.to_dict(),
        "machines": machines.to_dict(),
    }


def _tell(console: Console, pings: dict[str, Any], bulk: list[dict[str, Any]], stats: NetStats, *, exact: bool) -> None:
    console.print(ports_table(stats, None, title="the switch"))
    for result in bulk:
        console.print(
            f"bulk, {result['size']:>4} bytes: {rate(result['pps'])}packets/s, {rate(result['bits_per_s'])}bit/s "
            "from one machine to another"
        )
    if pings["sent"]:
        console.print(
            f"ping round trip, through Python at both ends: median {pings['p50_us']:.0f} µs, "
            f"99 % within {pings['p99_us']:.0f} µs, longest {pings['max_us']:.0f} µs, {pings['lost']} lost"
        )
    console.print(totals_line(stats))
    console.print("every packet is accounted for" if exact else "[red]packets are unaccounted for[/]")


def _percentiles(times: list[float]) -> dict[str, float]:
    import statistics

    if len(times) < 2:
        return {"p50_us": 0.0, "p90_us": 0.0, "p99_us": 0.0, "max_us": 0.0}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50_us": cuts[49], "p90_us": cuts[89], "p99_us": cuts[98], "max_us": max(times)}


def _mac(i: int) -> bytes:
    return bytes([0x52, 0x54, 0, 0, 0, i + 1])


def _ip(i: int) -> bytes:
    return bytes([10, 0, 0, i + 1])
