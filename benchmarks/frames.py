"""The frames that benchmarks send: UDP over IPv4 between stations with addresses of their own."""

from __future__ import annotations

from virtnet.kinds import discard_frame


def mac(port: int, station: int = 0) -> bytes:
    """The address of a station behind a port; station 0 has the one that testpmd's driver is given."""
    return bytes([2, 0, 0, *station.to_bytes(2, "big"), port + 1])


def between(port: int, ports: int, size: int, *, stations: int = 1) -> list[bytes]:
    """What port number ``port`` of ``ports`` sends: from each of its stations to its counterpart at the other port."""
    other = ports - 1 - port
    body = discard_frame(size)[12:]
    return [mac(other, station) + mac(port, station) + body for station in range(stations)]


def flows(size: int, n: int) -> list[bytes]:
    """What the first of two ports sends if each packet belongs to another of ``n`` flows than the one before."""
    (frame,) = between(0, 2, size)
    # UDP without a checksum, which IPv4 allows.
    return [
        frame[:34] + (10_000 + number).to_bytes(2, "big") + frame[36:40] + bytes(2) + frame[42:] for number in range(n)
    ]
