"""A port that plays a Python iterable of frames into a network."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from virtnet.errors import StateError
from virtnet.nodes import PortNode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtnet.burst import Burst, Frame
    from virtnet.net import Net
    from virtnet.spec import PortSpec

__all__ = ["IterablePort"]

#: How often a feeder that waits for room, or for its network, looks.
LOOK_S = 0.001

#: How long an iterable may take for its last frame before it is left behind.
SETTLE_S = 1.0


class IterablePort(PortNode):
    """A port from which the frames of a Python iterable come, made by :meth:`virtnet.Net.iterable`.

    A thread takes them one by one, from when the network runs and the port is plugged in, and waits whenever the
    network has not taken so many as its capacity; a worker never waits for it. What is sent to the port is there at
    ``.end``, for whoever wants it, and dropped as ``no_room`` when nobody takes it.

    Attributes:
        played: frames that went into the network so far.
        error: what the iterable raised, or what was wrong with what it gave; the network goes on without it.
    """

    def __init__(self, net: Net, name: str, spec: PortSpec, frames: Iterable[Frame | Burst]) -> None:
        """Made by the network."""
        super().__init__(net, name, spec)
        self.played = 0
        self.error: BaseException | None = None
        self._frames = frames
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come: the iterable is at its end, has raised, or its network is stopped."""
        return self._over.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing more will come; whether that happened in time.

        Raises:
            BaseException: what the iterable raised.
        """
        done = self._over.wait(timeout_s)
        if self.error is not None:
            raise self.error
        return done

    @property
    def state(self) -> str:
        """How it is, in a few words."""
        state = super().state
        if self.error is not None:
            return f"{state}, ended by {type(self.error).__name__}: {self.error}"
        return f"{state}, at its end" if self.done else state

    def _begin(self) -> None:
        """Begins to play, once; its network runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"virtnet-{self.name}"[:15], daemon=True)
            self._thread.start()

    def _end(self) -> None:
        """Ends it, with its network. An iterable that hangs is not waited for."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(SETTLE_S)

    def _run(self) -> None:
        import logging

        frames: Any = None
        try:
            frames = iter(self._frames)
            if self._may_play():
                for item in frames:
                    if self._over.is_set() or not self._play(item):
                        break
        except StateError:
            if not self._is_gone():
                raise
        except BaseException as error:
            self.error = error  # the user's, who is told by wait() as well
            logging.getLogger("virtnet").exception("the iterable of %r raised", self.name)
        finally:
            self._over.set()
            if hasattr(frames, "close"):
                frames.close()

    def _is_gone(self) -> bool:
        return self._over.is_set() or self.name not in self.net or self.net[self.name] is not self

    def _may_play(self) -> bool:
        """Waits until the port is plugged in: before that every frame would be lost."""
        while not self._is_gone():
            if any(self.name in cable for cable in self.net.cables):
                return True
            time.sleep(LOOK_S)
        return False

    def _play(self, item: Frame | Burst) -> bool:
        """Sends a frame, or a burst of them, when there is room; whether it could."""
        from virtnet.burst import Burst

        burst = item if isinstance(item, Burst) else Burst([item])
        at = 0
        while at < len(burst):
            if self.end is None or self._is_gone():
                return False
            sent = self.end.tx(burst[at:] if at else burst)
            at += sent
            self.played += sent
            if at < len(burst):
                time.sleep(LOOK_S)
        return True
