"""Networks: describe, run, change while they run.

::

    with Net() as net:
        vm1 = net.vhost_user("vm1.sock")
        vm2 = net.vhost_user("vm2.sock", queue_pairs=2)
        switch = net.switch(ageing_s=300)
        vm1 >> switch << vm2
        print(vm1.qemu_args())
        net.serve()

A network is nodes (ports and functions) by name and cables between them. ``a >> b`` and ``b << a`` plug in the same
cable, which carries packets both ways; ``>>`` gives back its right side and ``<<`` its left, so chains read as they
are cabled.

Before :meth:`Net.start` a network is only described, and nothing is opened. While it runs, each change takes effect
when it is made, whole or not at all: a port that cannot be opened raises where it was asked for, and everybody else
loses no packet. Changes that belong together go into a ``with net.change():`` block.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from virtnet import _virtnet
from virtnet.composing import Composing
from virtnet.description import FunctionSpec, Plan, Poll, Spec
from virtnet.errors import ConfigError, StateError
from virtnet.feeding import IterablePort
from virtnet.nodes import Node, PortNode
from virtnet.plans import Plans, planned
from virtnet.remote.place import Listener, check_name
from virtnet.remote.server import Server
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtnet.stats import NetStats

__all__ = ["Net"]

POLLS: tuple[Poll, ...] = ("adaptive", "busy", "interrupt")

#: A signal that another thread caught, and an end elsewhere, are noticed after this long.
WAIT_SLICE_S = 0.25


class Net(Composing):
    """A network of ports and functions.

    Args:
        cpus: the processors its workers are pinned to, one worker each; none means one worker, anywhere. The queue
            pairs of a vhost-user port are spread over the workers, and so are ports of one queue pair.
        poll: what workers do when there is nothing to do: ``adaptive`` looks again while traffic flows and sleeps when
            it stops, ``busy`` never sleeps, ``interrupt`` always does. The first two leave a port that millions of
            packets a second come from alone for up to 12 us when it has none, if more come then.
        name: what others find it by while it runs: processes of the same user and of root look at it and change it
            with :func:`~virtnet.attach` and ``virtnet show NAME``. With a slash it is the path of a socket for that.
            Without a name nobody can.

    Raises:
        ConfigError: an argument makes no sense.
    """

    def __init__(self, *, cpus: Sequence[int] = (), poll: Poll = "adaptive", name: str | None = None) -> None:
        """Begins a description; nothing is opened."""
        from virtnet.stats import NetStats

        if poll not in POLLS:
            raise ConfigError(f"poll is adaptive, busy or interrupt, found {poll!r}")
        super().__init__()
        self._cpus = [_cpu(number) for number in cpus]
        self._poll: Poll = poll
        self._called = None if name is None else check_name(name)
        self._server: Server | None = None
        self._engine: _virtnet.Engine | None = None
        #: What the network was before each change that can be taken back.
        self._history: list[Spec] = []
        self._last = NetStats()
        #: What had happened at each port when the network was stopped.
        self._last_events: dict[str, tuple[list[dict[str, Any]], int]] = {}
        #: Not an event: its lock could be held by what a signal interrupts.
        self._ended = False

    # The network as a value.

    @property
    def spec(self) -> Spec:
        """What the network is described as now."""
        with self._lock:
            nodes = self._plan.nodes
            return Spec(
                {name: node.spec for name, node in nodes.items() if isinstance(node.spec, PortSpec)},
                {name: node.spec for name, node in nodes.items() if isinstance(node.spec, FunctionSpec)},
                frozenset(self._plan.cables),
                tuple(self._cpus),
                self._poll,
            )

    @classmethod
    def of(cls, spec: Spec, *, name: str | None = None) -> Net:
        """A network as specified; nothing is opened before :meth:`start`."""
        net = cls(cpus=spec.cpus, poll=spec.poll, name=name)
        net.apply(spec)
        return net

    def plan(self, spec: Spec) -> Plan:
        """What :meth:`apply` would do; nothing is done."""
        return Plan(self.spec, spec)

    def apply(self, spec: Spec) -> Plan:
        """Makes the network what a specification says, wholly or not at all, and returns what that changed.

        What stays as it is keeps its sessions, tables and counters, and loses no packet. Handles of ports and functions
        that keep their name and kind stay good.

        Raises:
            ConfigError: a running network cannot get other workers; the caller's fault.
            PortError: the system refused a port; the network is and runs as before.
        """
        with self._lock:
            before = self.spec
            if self._engine is not None and (spec.cpus, spec.poll) != (before.cpus, before.poll):
                raise ConfigError("net: cpus and poll are those of the workers and stay while the network runs")
            with self.change():
                self._plan = self._planned(spec)
            self._cpus, self._poll = list(spec.cpus), spec.poll
            for node in self._plan.nodes.values():
                node.handle.spec = node.spec
                if isinstance(node.handle, PortNode):
                    node.handle.end = node.end
            if before != spec:
                self._history.append(before)
            return Plan(before, spec)

    def rollback(self) -> Plan:
        """Takes back the last :meth:`apply` that was not taken back yet, and returns what that changed.

        Raises:
            StateError: there is none.
            PortError: as for :meth:`apply`.
        """
        with self._lock:
            if not self._history:
                raise StateError("nothing was applied that could be taken back")
            plan = self.apply(self._history[-1])
            del self._history[-2 if plan else -1 :]
            return plan

    # Life.

    def start(self) -> Self:
        """Opens the ports and starts the workers. A network that was stopped starts afresh, with counters at 0.

        Raises:
            StateError: it runs already.
            PortError: the system refused a port, or a network of that name runs; nothing runs, nothing is open.
        """
        with self._lock, ExitStack() as undo:
            if self._engine is not None:
                raise StateError("the network runs already")
            listener = Listener.open(self._called) if self._called is not None else None
            if listener is not None:
                undo.callback(listener.close)
            engine = _virtnet.Engine(self._cpus, self._poll)
            undo.callback(engine.stop)
            self._apply(engine, Plans())
            if listener is not None:
                self._server = Server(self, listener)
            undo.pop_all()
            self._ended = False
            self._engine = engine
            self._captures_opened()
            self._last_events = {}
            for player in self._players():
                player._begin()  # noqa: SLF001 - a part of the network
        return self

    def stop(self) -> None:
        """Stops the workers and closes the ports. The last counters stay readable; again does nothing."""
        from virtnet.stats import NetStats

        server, self._server = self._server, None
        if server is not None:
            server.close()  # before the lock, which those that are being answered may need
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.stop()
                self._last = NetStats.from_dict(engine.stats())
                ports = (name for name, node in self._plan.nodes.items() if isinstance(node.spec, PortSpec))
                self._last_events = {name: engine.events(name, 0) for name in ports}
                for capture in self.captures:
                    capture.stats()
                self._plan = replace(self._plan, captures=())
            self._ended = True
        for player in self._players():
            player._end()  # noqa: SLF001 - a part of the network; after the lock, which its iterable may need

    def _players(self) -> list[IterablePort]:
        return [node.handle for node in self._plan.nodes.values() if isinstance(node.handle, IterablePort)]

    def serve(self, seconds: float | None = None) -> None:
        """Runs until Ctrl-C, until :meth:`stop` is called elsewhere, or for a time; starts what is not started.

        When the time is over or Ctrl-C was pressed, the network stops. In the main thread a request to end
        (SIGTERM) does the same.
        """
        if not self.running:
            self.start()
        with self._ended_by_sigterm():
            try:
                self.wait(seconds)
            except KeyboardInterrupt:
                pass
            finally:
                self.stop()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the network is stopped elsewhere; whether that happened within the time given."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._ended:
            left = WAIT_SLICE_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, WAIT_SLICE_S))
        return True

    def _set_link(self, port: PortNode, up: bool) -> None:
        with self._lock:
            if self._engine is None or port.name not in self:
                raise StateError(
                    f"the link of {port.name!r} cannot be taken {'up' if up else 'down'}: it is {port.state}"
                )
            self._engine.set_link(port.name, up)

    def _command(self, port: PortNode, name: str, arguments: dict[str, Any]) -> None:
        self._running(port).command(port.name, name, arguments)

    def _device_stats(self, port: PortNode, asked: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        return self._running(port).device_stats(port.name, {"asked": asked})

    def _device_state(self, port: PortNode, state: bytes | None) -> bytes:
        return self._running(port).device_state(port.name, state)

    def _running(self, port: PortNode) -> _virtnet.Engine:
        """What runs, to ask something of a port that has to be there."""
        with self._lock:
            if self._engine is None or port.name not in self:
                raise StateError(f"the device of {port.name!r} cannot be asked: it is {port.state}")
            return self._engine

    @property
    def name(self) -> str | None:
        """What others find it by while it runs, ``None`` if they cannot."""
        return self._called

    @property
    def running(self) -> bool:
        """Whether it is started."""
        return self._engine is not None

    def _events(self, port: str, first: int) -> tuple[list[dict[str, Any]], int]:
        """What has happened at a port from event number ``first`` on, and how many events were lost."""
        with self._lock:
            if self._engine is not None:
                return self._engine.events(port, first)
            events, dropped = self._last_events.get(port, ([], 0))
            return [event for event in events if event["number"] >= first], dropped

    def _rings(self, port: str) -> list[dict[str, Any]]:
        """How the rings of a port stand."""
        with self._lock:
            return self._engine.rings(port) if self._engine is not None else []

    def stats(self) -> NetStats:
        """The counters now; of a network that was stopped, those at its end."""
        from virtnet.stats import NetStats

        with self._lock:
            return NetStats.from_dict(self._engine.stats()) if self._engine is not None else self._last

    def _passed(self) -> int:
        """How many packets ports have received and sent, which costs next to nothing to ask."""
        with self._lock:
            if self._engine is not None:
                return self._engine.passed()
        return sum(port.received + port.sent for port in self._last.ports.values())

    def __enter__(self) -> Self:
        """Starts it; the end of the block stops it."""
        return self.start()

    def __exit__(self, *exc: object) -> None:
        """Stops it."""
        self.stop()

    # Looking at it.

    @property
    def cables(self) -> tuple[tuple[str, str], ...]:
        """The cables, as pairs of names."""
        return self._plan.cables

    def __contains__(self, name: object) -> bool:
        """Whether there is a node of that name."""
        return name in self._plan.nodes or name in self._plan.capture_nodes()

    def __iter__(self) -> Iterator[Node]:
        """The nodes, in the order they were added."""
        return iter([node.handle for node in self._plan.nodes.values()])

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._plan.nodes)

    def __repr__(self) -> str:
        """What it is made of and whether it runs."""
        state = "running" if self.running else "not running"
        plan = self._plan
        ports = sum(isinstance(node.handle, PortNode) for node in plan.nodes.values())
        return f"<Net {state}: {ports} ports, {len(plan.nodes) - ports} functions, {len(plan.cables)} cables>"

    def _repr_html_(self) -> str:
        """A table of the ports, for notebooks."""
        from virtnet.showing import table
        from virtnet.stats import PortStats

        stats = self.stats()
        heads = ["port", "", "state", "received", "sent", "dropped"]
        rows = [
            [node.name, str(node.spec), node.state, port.received, port.sent, sum(port.drops.values())]
            for node in self
            if isinstance(node, PortNode)
            for port in [stats.ports.get(node.name, PortStats())]
        ]
        return f"<p>{repr(self)[1:-1]}</p>{table(heads, rows)}"

    # Inside.

    @contextmanager
    def _ended_by_sigterm(self) -> Iterator[None]:
        """While the block runs, SIGTERM ends the network; only the main thread may arrange that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(_number: int, _frame: object) -> None:
            self._ended = True

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _planned(self, spec: Spec) -> Plans:
        """The description that a specification means, with the handles of the nodes that keep their kind."""
        nodes = {}
        described: list[tuple[str, PortSpec | FunctionSpec]] = [*spec.ports.items(), *spec.functions.items()]
        for name, wanted in described:
            node = self._plan.nodes.get(name)
            if node is None or node.handle.kind != wanted.kind:
                node = planned(self._handle(name, wanted), wanted)
            elif node.spec != wanted:
                node = planned(node.handle, wanted)
            nodes[name] = node
        kept = [cable for cable in self._plan.cables if (min(cable), max(cable)) in spec.cables]
        new = spec.cables - {(min(cable), max(cable)) for cable in kept}
        return replace(self._plan, nodes=nodes, cables=(*kept, *sorted(new)))

    def _captures_opened(self) -> None:
        if self._engine is not None:
            for capture in self.captures:
                capture.opened()

    def _changed(self, before: Plans) -> None:
        if self._engine is not None:
            self._apply(self._engine, before)

    def _apply(self, engine: _virtnet.Engine, before: Plans) -> None:
        """Makes the engine run the description instead of the one before: wholly, or not at all."""
        after = self._plan
        gone = {
            name: node.options["where"]
            for name, node in before.nodes.items()
            if isinstance(node.spec, PortSpec) and node.spec.kind != "memory" and node != after.nodes.get(name)
        }
        wanted = {node.options.get("where") for name, node in after.nodes.items() if node != before.nodes.get(name)}
        # What is closed to be opened anew must be let go of first; whoever needs nothing of it goes on.
        freed = {name for name, where in gone.items() if where in wanted}
        if not freed:
            engine.apply(*after.described())
            return
        engine.apply(*before.without(freed).described())
        try:
            engine.apply(*after.described())
        except BaseException:
            engine.apply(*before.described())
            raise


def _cpu(number: int) -> int:
    if type(number) is not int or number < 0:
        raise ConfigError(f"cpus are numbers of processors from 0, found {number!r}")
    return number
