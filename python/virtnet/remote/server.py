"""The side of a network that answers: one thread that waits for callers, and one for each of them while it is served.

A caller has little time to ask and to take its answer, there is room for few at once, and a line has a longest length:
whoever is slow, silent or talks nonsense costs a thread for some seconds, and nobody else anything. The threads end
with the network, and none of them keeps it alive.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from virtnet.errors import StateError, VirtnetError
from virtnet.remote.lines import answer, error_to, read_request, receive_request
from virtnet.remote.requests import REQUESTS

if TYPE_CHECKING:
    from virtnet.net import Net
    from virtnet.remote.place import Listener

__all__ = ["Server"]

#: Callers served at once.
CALLERS_MAX = 32

#: How long a caller may take to say what it wants, and to take its answer.
ASK_S = 5.0
ANSWER_S = 5.0

#: How long a network that ends waits for answers that are under way.
END_S = 1.0

#: ``struct ucred``.
CREDENTIALS = struct.Struct("3i")


class Server:
    """Answers whoever connects to a network's socket, until it is closed or the network is gone."""

    def __init__(self, net: Net, listener: Listener) -> None:
        """Begins to answer."""
        self.path = listener.path
        self._listener = listener
        self._net = weakref.ref(net)
        self._callers: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._closing = False
        #: Written to when it is to end: closing what another thread waits for would not wake it.
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="virtnet-callers", daemon=True)
        self._thread.start()
        self._abandon = weakref.finalize(net, _wake, self._wake)

    def close(self) -> None:
        """Ends it: callers that wait are let go, and what is being answered is answered. Again does nothing."""
        self._abandon.detach()
        with self._lock:
            self._closing = True
            callers = dict(self._callers)
        _wake(self._wake)
        for caller in callers.values():
            _shut(caller, socket.SHUT_RD)
        self._join([self._thread, *callers], END_S)
        for thread, caller in callers.items():
            if thread.is_alive():
                _shut(caller, socket.SHUT_RDWR)
        self._join(list(callers), END_S)

    @staticmethod
    def _join(threads: list[threading.Thread], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._listener.socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        try:
            while not any(descriptor == self._woken.fileno() for descriptor, _ in poll.poll()):
                with contextlib.suppress(OSError):  # it left before it was attended to, or there is no descriptor left
                    self._welcome(self._listener.socket.accept()[0])
                    continue
                time.sleep(0.05)
        finally:
            self._listener.close()
            self._woken.close()
            self._wake.close()

    def _welcome(self, caller: socket.socket) -> None:
        """Has a thread serve a caller, if there is room for one."""
        thread = threading.Thread(target=self._serve, args=(caller,), name="virtnet-caller", daemon=True)
        with self._lock:
            refusal = None
            if self._closing:
                refusal = StateError("the network is ending")
            elif len(self._callers) >= CALLERS_MAX:
                refusal = StateError(f"{CALLERS_MAX} others ask this network already: ask again in some seconds")
            else:
                self._callers[thread] = caller
        if refusal is not None:
            with caller, contextlib.suppress(OSError):
                caller.setblocking(False)
                caller.send(error_to(refusal))
            return
        try:
            thread.start()
        except RuntimeError:  # the system has no threads left
            self._forget(thread)
            caller.close()

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            self._callers.pop(thread, None)

    def _serve(self, caller: socket.socket) -> None:
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._forget, threading.current_thread())
            leaving.enter_context(caller)
            leaving.enter_context(contextlib.suppress(OSError))  # it has left, or was too slow
            try:
                _check_owner(caller)
                line, passed = receive_request(caller, ASK_S)
                for descriptor in passed:
                    leaving.callback(os.close, descriptor)
                if line is None:
                    return
                do, arguments = read_request(line)
                if do == "stop":
                    # It ends this thread too, and the answer is owed even when the process ends with the network.
                    ending = caller.dup()
                    threading.Thread(target=self._stop, args=(ending,), name="virtnet-stop").start()
                    return
                result = self._do(do, arguments, passed, caller)
            except TimeoutError:
                return
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                self._say(caller, error_to(error))
            else:
                self._say(caller, answer(result))

    def _do(self, do: str, arguments: dict[str, Any], passed: list[int], caller: socket.socket) -> Any:
        net = self._net()
        if net is None or self._closing:
            raise StateError("the network has ended")
        carry_out = REQUESTS.get(do)
        if carry_out is None:
            raise VirtnetError(f"this network knows no request {do[:80]!r}: it knows {', '.join([*REQUESTS, 'stop'])}")
        return carry_out(net, arguments, passed, lambda begun: self._say(caller, answer(begun)), caller)

    def _stop(self, caller: socket.socket) -> None:
        with caller:
            net = self._net()
            try:
                if net is not None:
                    net.stop()
                said = answer(None)
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                said = error_to(error)
            with contextlib.suppress(OSError):
                self._say(caller, said)

    @staticmethod
    def _say(caller: socket.socket, line: bytes) -> None:
        caller.settimeout(ANSWER_S)
        caller.sendall(line)


def _check_owner(caller: socket.socket) -> None:
    """The directory lets nobody else in; this holds wherever the socket is."""
    raw = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _pid, user, _group = CREDENTIALS.unpack(raw)
    if user not in {0, os.geteuid()}:
        raise StateError(f"this network belongs to user {os.geteuid()}, and user {user} is not let in")


def _wake(waker: socket.socket) -> None:
    with contextlib.suppress(OSError):
        waker.send(b"\0")


def _shut(caller: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        caller.shutdown(how)
