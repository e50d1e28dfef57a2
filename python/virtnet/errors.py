"""What can go wrong, and whose fault it is.

::

    VirtnetError
    ├── ConfigError   (ValueError)     you     an option, a name or a cable makes no sense; nothing has changed
    ├── StateError    (RuntimeError)   you     not now: closed, not started, already gone
    ├── GuestError                     guest   a driver broke its ring; that queue is stopped, the others go on
    ├── PeerError                      peer    the other end of a socket broke the protocol; the session is over
    │   └── PeerGone                   nobody  the other end has left; a port waits for it to come back
    └── PortError     (OSError)        host    the system refused; ``errno`` says what, the message what to do

Outcomes are no errors: nothing has arrived, no room, dropped are return values and counters.
"""

from __future__ import annotations

from typing import ClassVar, Literal

__all__ = ["ConfigError", "GuestError", "PeerError", "PeerGone", "PortError", "StateError", "VirtnetError"]

Fault = Literal["caller", "guest", "peer", "host", "nobody"]


class VirtnetError(Exception):
    """Anything that virtnet raises. ``fault`` says whose mistake it was."""

    fault: ClassVar[Fault] = "caller"


class ConfigError(VirtnetError, ValueError):
    """What was asked for makes no sense. The message says what was expected and what was found."""


class StateError(VirtnetError, RuntimeError):
    """What was asked for cannot be done now, such as using a port that is closed."""


class GuestError(VirtnetError):
    """A driver broke the rules of its virtqueue. That queue is stopped and everything else goes on."""

    fault = "guest"


class PeerError(VirtnetError):
    """The other end of a vhost-user socket broke the protocol. The session is over; the port may meet another."""

    fault: ClassVar[Fault] = "peer"


class PeerGone(PeerError):  # noqa: N818 - it is said of somebody, who need not have erred
    """The other end has left."""

    fault = "nobody"


class PortError(VirtnetError, OSError):
    """The system refused what a port needs: no such device, no rights, address in use."""

    fault = "host"

    def __str__(self) -> str:
        """The message without the number, which ``errno`` holds."""
        return self.strerror or super().__str__()
