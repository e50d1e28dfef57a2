"""What a vhost-user back-end offers, asked as a front-end would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from virtnet import _virtnet
from virtnet.errors import ConfigError
from virtnet.features import NetFeature, ProtocolFeature, RingFeature
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    import os

__all__ = ["Offer", "probe"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back-end offers.

    Attributes:
        features: the word of features, before negotiation.
        protocol_features: the word of vhost-user's own features, ``None`` when it has none.
        queue_pairs: how many pairs of queues it takes, ``None`` when it does not tell.
        memory_slots: how many regions of memory it takes, ``None`` when it does not tell.
    """

    features: int
    protocol_features: int | None = None
    queue_pairs: int | None = None
    memory_slots: int | None = None

    @property
    def net_features(self) -> NetFeature:
        """The features of the network device."""
        return NetFeature.within(self.features)

    @property
    def ring_features(self) -> RingFeature:
        """The features of rings and transport."""
        return RingFeature.within(self.features)

    @property
    def protocol(self) -> ProtocolFeature:
        """The features of the vhost-user protocol."""
        return ProtocolFeature(self.protocol_features or 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; features by name."""
        return {
            "features": [*self.net_features.names(), *self.ring_features.names()],
            "features_word": self.features,
            "protocol_features": self.protocol.names(),
            "protocol_features_word": self.protocol_features,
            "queue_pairs": self.queue_pairs,
            "memory_slots": self.memory_slots,
        }


def probe(path: str | os.PathLike[str], *, timeout_s: float = 5.0) -> Offer:
    """Attaches to a back-end's socket, asks what it offers, and leaves without starting a ring.

    A back-end that serves one front-end at a time takes this for one that came and went.

    Args:
        path: the socket on which the back-end listens.
        timeout_s: how long to wait for its answers.

    Raises:
        PortError: nobody listens there.
        PeerError: it answered something else than vhost-user, or not in time.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is a number of seconds above 0, found {timeout_s!r}")
    spec = PortSpec.of("virtio-user", str(path))
    return Offer(**_virtnet.probe(spec.where, timeout_s))
