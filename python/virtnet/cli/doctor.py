"""``doctor``: what this host has, and what follows from it for virtnet."""

from __future__ import annotations

import fcntl
import json as json_
import os
import resource
import struct
from dataclasses import asdict, dataclass
from errno import EACCES
from pathlib import Path
from typing import Literal

from virtnet import ConfigError, PortError, build_info, line_cost_ns
from virtnet._virtnet import try_af_xdp
from virtnet.cli.options import Json  # noqa: TC001 - Typer reads the annotations

__all__ = ["Finding", "doctor", "examine"]

KVM_GET_API_VERSION = 0xAE00
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
CAP_NET_ADMIN = 12

#: Descriptors that a port with a queue pair, its memory and its socket needs, generously.
FDS_PER_PORT = 16

#: Two CPUs that share a cache take less.
FAR_NS = 100

Level = Literal["good", "fine", "poor"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: the thing.
        found: what is there.
        level: ``good`` as it is, ``fine`` without consequence worth acting on, ``poor`` with one.
        follows: what that means for virtnet, and what to do if anything.
    """

    what: str
    found: str
    level: Level
    follows: str


def doctor(json: Json = False) -> None:
    """Show what this host has for virtual networks, and what follows."""
    from rich.console import Console
    from rich.table import Table

    findings = examine()
    if json:
        print(json_.dumps({"findings": [asdict(finding) for finding in findings]}))
        return
    table = Table(show_lines=True)
    for head in ("", "found", "what follows"):
        table.add_column(head, overflow="fold")
    colours = {"good": "green", "fine": "dim", "poor": "yellow"}
    for finding in findings:
        table.add_row(finding.what, f"[{colours[finding.level]}]{finding.found}[/]", finding.follows)
    Console().print(table)


def examine() -> list[Finding]:
    """Looks at everything; changes nothing."""
    return [_build(), _cpus(), _huge_pages(), _tap(), _af_xdp(), _descriptors(), _locked_memory(), _kvm()]


def _build() -> Finding:
    info = build_info()
    found = f"virtnet {info['version']}, {info['profile']} build"
    if info["profile"] == "debug":
        return Finding(
            "this package", found, "poor", "several times slower than a release build: `pip install .` makes one"
        )
    return Finding("this package", found, "good", "")


def _cpus() -> Finding:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return Finding(
            "processors",
            "1",
            "poor",
            "peers and workers take turns: leave --poll at adaptive, busy polling starves the others",
        )
    follows = f"workers can have their own: --cpu {cpus[-1]}"
    try:
        cost_ns = line_cost_ns(cpus[0], cpus[-1])
    except (ConfigError, PortError) as error:
        return Finding("processors", str(len(cpus)), "good", f"{follows} (how far apart they are is unknown: {error})")
    found = f"{len(cpus)}; a cache line takes {cost_ns:.0f} ns from {cpus[0]} to {cpus[-1]}"
    if cost_ns > FAR_NS:
        follows += "; these two are far apart, so put workers and peers on CPUs that share a cache where you can"
    return Finding("processors", found, "good", follows)


def _huge_pages() -> Finding:
    pools = []
    for pool in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        total, free = ((pool / f"{name}_hugepages").read_text().strip() for name in ("nr", "free"))
        if int(total):
            size_kib = int(pool.name.removeprefix("hugepages-").removesuffix("kB"))
            pools.append(f"{free} of {total} free, {size_kib // 1024} MiB each")
    if pools:
        return Finding("huge pages", "; ".join(pools), "good", "drivers of virtio-user ports use them")
    return Finding(
        "huge pages",
        "none reserved",
        "fine",
        "not needed: ordinary pages serve, at some cost in address translation for large rings",
    )


def _tap() -> Finding:
    device = Path("/dev/net/tun")
    if not device.exists():
        return Finding("taps", "no /dev/net/tun", "poor", "no tap ports: load the module with `modprobe tun` as root")
    if not _may_administer():
        return Finding(
            "taps",
            "no right to make them",
            "fine",
            "tap ports need CAP_NET_ADMIN, or an interface made for this user: "
            f"`ip tuntap add dev tap0 mode tap user {os.getuid()}` as root",
        )
    error = _try_tap(device)
    if error is not None:
        return Finding("taps", f"refused: {error.strerror}", "poor", "no tap ports here, whatever the rights say")
    return Finding("taps", "may be made", "good", "tap ports work")


def _af_xdp() -> Finding:
    try:
        try_af_xdp()
    except PortError as error:
        if error.errno == EACCES:
            follows = "af-xdp ports need root, or CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF"
            return Finding("AF_XDP", "no right to use it", "fine", follows)
        return Finding("AF_XDP", f"{error}", "fine", "no af-xdp ports here: af-packet ports do the same, more slowly")
    return Finding("AF_XDP", "usable", "good", "af-xdp ports work; whether without copying is up to the card's driver")


def _may_administer() -> bool:
    status = Path("/proc/self/status").read_text()
    word = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(word, 16) >> CAP_NET_ADMIN & 1)


def _try_tap(device: Path) -> OSError | None:
    """Makes an interface that is gone with its descriptor; what the kernel says against it."""
    try:
        with device.open("rb+", buffering=0) as tap:
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"vndoctor%d", IFF_TAP | IFF_NO_PI))
    except OSError as error:
        return error
    return None


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_ports = soft // FDS_PER_PORT
    found = f"{soft} (could be {hard})" if hard > soft else str(soft)
    if n_ports < 32:
        return Finding("open files", found, "poor", f"room for about {n_ports} ports: raise it with `ulimit -n {hard}`")
    return Finding("open files", found, "good", f"room for about {n_ports} ports")


def _locked_memory() -> Finding:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    return Finding("locked memory", found, "fine", "only af-xdp ports lock any, and root's are not limited")


def _kvm() -> Finding:
    try:
        with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
            version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    except OSError as error:
        found = "not there" if isinstance(error, FileNotFoundError) else f"refused: {error.strerror}"
        return Finding("KVM", found, "fine", "QEMU guests are emulated and slow; virtnet itself does not need it")
    return Finding("KVM", f"usable, version {version}", "good", "QEMU guests run at full speed: `-accel kvm`")
