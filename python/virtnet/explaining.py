"""What keeps a port from moving packets, in words: how far the other end has come, what it lacks, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from virtnet.features import NetFeature, RingFeature

if TYPE_CHECKING:
    from virtnet.spec import PortSpec
    from virtnet.stats import PortStats, RingState

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a port stands.

    Attributes:
        state: in one sentence.
        facts: what is known besides, a sentence each.
        remedy: what to do if that is not as it should be, ``None`` where nothing is missing.
    """

    state: str
    facts: tuple[str, ...] = ()
    remedy: str | None = None

    def __str__(self) -> str:
        """All of it, a line each."""
        lines = [self.state, *(f"  {fact}" for fact in self.facts)]
        return "\n".join(lines + ([f"  To do: {self.remedy}"] if self.remedy else []))

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from virtnet.showing import escape

        facts = "".join(f"<li>{escape(fact)}</li>" for fact in self.facts)
        remedy = f"<p>To do: {escape(self.remedy)}</p>" if self.remedy else ""
        return f"<p><b>{escape(self.state)}</b></p><ul>{facts}</ul>{remedy}"


SHARED = (
    "QEMU hands over memory that is shared: -object memory-backend-memfd,...,share=on and "
    "-machine memory-backend=..., as qemu_args() has it; and it wants no more queues than this port offers"
)

#: How far a front-end had come when it left: what it did not do any more, and what mostly keeps it from that.
LEFT_AT: dict[str, tuple[str, str | None]] = {
    "greeting": (
        "before agreeing on features",
        "it may have been a look only (virtnet probe), or want another kind of device than a network card",
    ),
    "features": (
        "after agreeing on features and before handing over its memory",
        SHARED,
    ),
    "memory": ("before its driver started", "look into the guest: it may have been shut down while it booted"),
}

#: What a front-end that is there has not done yet, and what it waits for.
WAITS_AT = {
    "greeting": ("is there and has not agreed on features yet", "wait, or look at what the other end says"),
    "features": ("has agreed on features and has not handed over its memory yet", SHARED),
    "memory": (
        "has handed over its memory, and its driver has not started",
        "the guest may still boot, or have no driver for virtio network cards (modprobe virtio_net)",
    ),
    "rings": (
        "has started rings, and not one of each direction that is enabled",
        "bring the interface up in the guest (ip link set ... up)",
    ),
}


#: So many rings are told of each by itself.
RINGS_TOLD = 8


def explain(stats: PortStats, spec: PortSpec, *, runs: bool = True, rings: tuple[RingState, ...] = ()) -> Explanation:
    """Says how a port stands.

    Args:
        stats: what it has counted.
        spec: what it is to be.
        runs: whether it is open at all.
        rings: how its rings stand.
    """
    explanation = _explain(stats, spec, runs=runs)
    # Rings that nobody has touched say nothing.
    touched = [ring for ring in rings if ring.started or ring.enabled or ring.broken]
    facts = [f"{ring}."[0].upper() + f"{ring}."[1:] for ring in touched[:RINGS_TOLD]]
    facts += [f"{len(touched) - RINGS_TOLD} more rings."] if len(touched) > RINGS_TOLD else []
    return replace(explanation, facts=(*explanation.facts, *facts))


def _explain(stats: PortStats, spec: PortSpec, *, runs: bool) -> Explanation:
    if not runs:
        return Explanation(f"{spec} is not open.", remedy="start the network")
    if stats.kind == "vhost-user":
        return _device(stats, spec)
    if stats.kind == "virtio-user":
        return _driver(stats, spec)
    others = {"stream": _peer, "dgram": _peer, "pcap": _file} | dict.fromkeys(
        ("tap", "af-packet", "af-xdp"), _interface
    )
    if stats.kind in others:
        return others[stats.kind](stats, spec)
    return Explanation(f"{spec} is open; there is nothing to agree on.", _traffic(stats))


def _file(stats: PortStats, spec: PortSpec) -> Explanation:
    if stats.state == "waiting":
        remedy = f"start who reads it (wireshark -k -i {spec.where})"
        return Explanation(f"Nobody reads {spec.where} yet; what comes is dropped.", _traffic(stats), remedy)
    if stats.state == "ended":
        remedy = "stop the capture, or have the port made anew"
        return Explanation(f"Nothing is written any more: {stats.last_error}.", _traffic(stats), remedy)
    return Explanation(f"{spec} is open.", _traffic(stats))


def _device(stats: PortStats, spec: PortSpec) -> Explanation:
    if stats.step == "running":
        return Explanation(f"{_who(stats)} is there, and packets can flow.", _agreed(stats) + _traffic(stats))
    if stats.step in WAITS_AT:
        what, remedy = WAITS_AT[stats.step]
        facts = _agreed(stats) if stats.features is not None else ()
        return Explanation(f"{_who(stats)} {what}.", facts + _refused(stats) + _traffic(stats), remedy)
    if stats.sessions:
        left, advice = LEFT_AT.get(stats.last_step or "", ("when it had worked", None))
        why = (f"The last session ended with: {stats.last_error}.",) if stats.last_error else ()
        count = f"There have been {stats.sessions} sessions." if stats.sessions > 1 else "There has been one session."
        state = f"Nobody is there any more: the last one left {left}."
        return Explanation(state, (count, *why, *_refused(stats), *_traffic(stats)), advice)
    if spec.options["client"]:
        why = (f"Last try: {stats.last_error}.",) if stats.last_error else ()
        return Explanation(
            f"Nobody listens at {spec.where} yet; it is tried again and again.",
            why,
            "start the other end, which must listen (QEMU: server=on), or have this port listen: without client",
        )
    return Explanation(
        f"Nobody has connected to {spec.where} yet.",
        (),
        "start a guest with the arguments of qemu_args(), which connects (no server=on), or a virtio-user port",
    )


def _driver(stats: PortStats, spec: PortSpec) -> Explanation:
    if stats.connected:
        return Explanation("A back-end is there, and packets can flow.", _agreed(stats) + _traffic(stats))
    why = (f"Last try: {stats.last_error}.",) if stats.last_error else ()
    if stats.state == "connected":
        return Explanation(
            "A back-end is there; it has not said yet that it runs.", why, "wait, or ask it (virtnet probe)"
        )
    if spec.options["server"]:
        return Explanation(
            f"No back-end has connected to {spec.where} yet.", why, "start one that connects (vhost-user:...,client=on)"
        )
    return Explanation(
        f"No back-end serves {spec.where}; it is tried again and again.", why, "start one that listens there"
    )


def _interface(stats: PortStats, spec: PortSpec) -> Explanation:
    facts = (*([f"Attached: {stats.xdp}."] if stats.xdp else []), *_traffic(stats))
    if stats.connected:
        return Explanation(f"The interface {spec.where} is up.", facts)
    if stats.last_error:
        return Explanation(
            f"The interface {spec.where} is gone, deleted or moved to another network namespace.",
            facts,
            "make the port anew when it is there again",
        )
    return Explanation(
        f"The interface {spec.where} is down.",
        facts,
        f"ip link set {spec.where} up, and look at the other end of its cable",
    )


def _peer(stats: PortStats, spec: PortSpec) -> Explanation:
    if stats.connected:
        who = f"Process {stats.peer_pid}" if stats.peer_pid else "Somebody"
        return Explanation(f"{who} is at the other end, as far as is known.", _traffic(stats))
    why = (f"Last error: {stats.last_error}.",) if stats.last_error else ()
    facts = (*why, *_traffic(stats))
    if spec.kind == "dgram":
        return Explanation(
            f"Nobody receives at {spec.options['remote']}.", facts, "start the other end; nothing else has to be done"
        )
    if spec.options["client"]:
        return Explanation(
            f"Nobody listens at {spec.where}; it is tried again and again.", facts, "start one that listens there"
        )
    return Explanation(
        f"Nobody has connected to {spec.where}" + (", or has left." if stats.sessions else " yet."),
        facts,
        "start a guest with the arguments of qemu_args(), which connects, or another stream port, with client=on",
    )


def _who(stats: PortStats) -> str:
    return f"Process {stats.peer_pid}" if stats.peer_pid else "A front-end"


def _agreed(stats: PortStats) -> tuple[str, ...]:
    facts = []
    if stats.ring:
        pairs = f", {stats.queue_pairs} queue pair{'s' if stats.queue_pairs > 1 else ''}" if stats.queue_pairs else ""
        facts.append(f"Agreed on: {stats.ring} rings{pairs}; {_names(stats.features or 0)}.")
    if stats.logging:
        facts.append("What is written to its memory is logged: the guest is being moved to another host.")
    if missing := (stats.offered or 0) & ~(stats.features or 0):
        facts.append(f"Offered and not taken: {_names(missing)}.")
    return tuple(facts)


def _names(word: int) -> str:
    names = [*NetFeature.within(word).names(), *RingFeature.within(word).names()]
    return ", ".join(name for name in names if name != "protocol_features") or "nothing"


def _refused(stats: PortStats) -> tuple[str, ...]:
    if not stats.refusals:
        return ()
    why = f", the last because {stats.last_error}" if stats.last_error else ""
    return (f"{stats.refusals} of its requests were refused{why}.",)


def _traffic(stats: PortStats) -> tuple[str, ...]:
    facts = [f"{stats.received} packets received, {stats.sent} sent."]
    if stats.drops:
        facts.append("Dropped: " + ", ".join(f"{n} {reason}" for reason, n in stats.drops.items()) + ".")
    return tuple(facts)
