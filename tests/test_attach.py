"""Networks of other processes: looked at, changed and stopped over their socket, whoever else talks there."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from scapy.utils import RawPcapNgReader

import virtnet as vn
from helpers import eventually, frame, mac, receive
from virtnet.remote import lines, place, server

pytestmark = pytest.mark.usefixtures("nothing_left")


def callers() -> list[str]:
    """Threads that answer."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("virtnet-")]


@pytest.fixture
def lab():
    """A network with a name, of two memory ports and a switch."""
    with vn.Net(name="lab") as net:
        net.memory("a") >> net.switch(name="sw") << net.memory("b")
        yield net
    assert eventually(lambda: callers() == [])
    assert vn.networks() == ()


def talk(said: bytes, *, end: bool = True) -> bytes:
    """What a network answers to bytes."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(20)
        caller.connect(str(place.find("lab")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(said)
            if end:
                caller.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := caller.recv(1 << 16):
                found += chunk
        return found


def test_what_another_process_sees_is_what_there_is(lab):
    lab["a"].end.tx([frame(mac(2), mac(1))] * 3)
    assert len(receive(lab["b"].end, 3)) == 3
    attached = vn.attach("lab")
    assert vn.networks() == ("lab",)
    assert attached.spec == lab.spec
    assert attached.stats().ports == lab.stats().ports
    assert attached.stats().functions == lab.stats().functions
    assert attached.stats().balance() == lab.stats().balance()
    assert attached.pid == os.getpid()
    assert [node.name for node in attached] == ["a", "b", "sw"]
    assert attached["sw"].kind == "switch"
    assert attached["a"].explain() == lab["a"].explain()
    assert "x" not in attached
    assert attached.running


def test_a_ports_story_and_its_rings_are_told(lab, sockets):
    lab.vhost_user(sockets / "vm", name="vm")
    port = vn.attach("lab")["vm"]
    with vn.VirtioUserPort(sockets / "vm") as driver:
        assert driver.wait_connected(5)
        assert port.wait_event("ring_started", 5).data["ring"] == 0
        assert [ring.started for ring in port.rings] == [True, True]
        assert port.rings == lab["vm"].rings
        assert port.events.items == lab["vm"].events.items
        assert str(port.explain()) == str(lab["vm"].explain())
        port.set_link(up=False)
        assert eventually(lambda: port.stats().link_up is False)


def test_a_change_from_beside_is_one_change_and_can_be_taken_back(lab):
    attached = vn.attach("lab")
    before = lab.spec
    wanted = vn.Spec(
        before.ports | {"c": vn.PortSpec.of("memory", "c")}, before.functions, before.cables | {("c", "sw")}
    )
    planned = attached.plan(wanted)
    assert planned.added == ("c",)
    assert lab.spec == before
    assert attached.apply(wanted) == planned
    assert lab.spec == attached.spec == wanted
    lab["c"].end.tx([frame(b"\xff" * 6, mac(3))])
    assert len(receive(lab["a"].end)) == 1
    assert attached.rollback().removed == ("c",)
    assert lab.spec == before


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        (lambda net: net.rollback(), vn.StateError, "nothing was applied"),
        (lambda net: net["x"], vn.ConfigError, "there is no node 'x'"),
        (lambda net: net["a"].set_link(up=True), vn.ConfigError, "only vhost-user ports have a link"),
        (
            lambda net: net.apply(vn.Spec({"t": vn.PortSpec.of("vhost-user", "/no/such/place/vm")})),
            vn.PortError,
            "no directory",
        ),
        (lambda net: net.apply(vn.Spec(poll="busy")), vn.ConfigError, "cpus and poll"),
        (lambda net: net["a"] >> net["b"], vn.StateError, "apply"),
        (lambda net: net._ask("dance"), vn.VirtnetError, "knows no request 'dance'"),
        (lambda net: net._ask("events", port="sw"), vn.ConfigError, "no port"),
        (lambda net: net._ask("events", port="a", first=-1), vn.ConfigError, "number of an event"),
        (lambda net: net._ask("apply", spec=[]), vn.ConfigError, "description"),
        (lambda net: net._ask("apply", spec={"ports": {"a": {"port": "tap"}}}), vn.ConfigError, "ports.a.port"),
        (lambda net: net._ask("set_link", port="a", up="yes"), vn.ConfigError, "true or false"),
    ],
)
def test_what_is_refused_raises_here_as_it_does_there(lab, ask, error, says):
    before = lab.spec
    with pytest.raises(error, match=says) as caught:
        ask(vn.attach("lab"))
    assert type(caught.value) is error
    assert lab.spec == before
    if error is vn.PortError:
        assert caught.value.errno


def test_a_network_that_is_stopped_from_beside_ends_whoever_serves_it():
    net = vn.Net(name="lab")
    net.switch()
    serving = threading.Thread(target=net.serve)
    serving.start()
    assert eventually(lambda: vn.networks() == ("lab",))
    attached = vn.attach("lab")
    attached.stop()
    serving.join(10)
    assert not serving.is_alive()
    assert attached.wait(5)
    assert not attached.running
    with pytest.raises(vn.StateError, match="has ended"):
        attached.stats()
    with pytest.raises(vn.StateError, match="no network 'lab' runs"):
        vn.attach("lab")
    with net:
        assert vn.attach("lab").running  # the same network started again


def test_a_name_is_one_networks_and_its_socket_one_users(lab, runtime_directory):
    path = runtime_directory / "virtnet" / "lab.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    other = vn.Net(name="lab")
    with pytest.raises(vn.PortError, match="a network 'lab' runs already"):
        other.start()
    assert not other.running
    assert vn.attach("lab").spec == lab.spec


def test_of_many_that_want_a_name_one_gets_it(sockets):
    name = str(sockets / "lab.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(name)  # what a process leaves behind that was killed
    nets = [vn.Net(name=name) for _ in range(8)]
    refused = []

    def start(net: vn.Net) -> None:
        try:
            net.start()
        except vn.PortError:
            refused.append(net)

    threads = [threading.Thread(target=start, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(refused) == 7
    assert vn.attach(name).running
    for net in nets:
        net.stop()
    assert not Path(name).exists()


def test_the_file_of_somebody_else_is_left_alone(sockets):
    path = sockets / "lab.sock"
    path.write_text("mine")
    with pytest.raises(vn.PortError, match="no socket"):
        vn.Net(name=str(path)).start()
    assert path.read_text() == "mine"
    path.unlink()
    with vn.Net(name=str(path)):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_a_port_that_cannot_be_opened_leaves_no_socket():
    net = vn.Net(name="lab")
    net.vhost_user("/no/such/place/vm")
    with pytest.raises(vn.PortError):
        net.start()
    assert vn.networks() == ()
    assert callers() == []


def test_a_directory_that_others_could_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "virtnet").mkdir(mode=0o755)
    (tmp_path / "virtnet").chmod(0o755)
    with pytest.raises(vn.PortError, match="open to others"):
        vn.Net(name="lab").start()
    (tmp_path / "virtnet").rmdir()
    (tmp_path / "virtnet").symlink_to(tmp_path)
    with pytest.raises(vn.PortError, match="no directory"):
        vn.Net(name="lab").start()


def test_where_there_is_no_runtime_directory_the_users_own_in_tmp_is_taken(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    name = f"test-{os.getpid()}"
    path = Path(f"/tmp/virtnet-{os.geteuid()}/{name}.sock")  # noqa: S108 - that is what is to be seen
    with vn.Net(name=name):
        assert place.find(name) == path
        assert vn.attach(name).pid == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("name", ["", ".", "-x", "a b", "x" * 65, "a\nb", "/" + "x" * 120])
def test_a_name_is_one_that_files_can_have(name):
    with pytest.raises(vn.ConfigError):
        vn.Net(name=name)
    with pytest.raises(vn.ConfigError):
        vn.attach(name)


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"virtnet":2,"do":"stats"}\n',
        b'{"virtnet":1}\n',
        b'{"virtnet":1,"do":"stats","with":[]}\n',
        b'{"virtnet":1,"do":"' + b"x" * 100_000 + b'"}\n',
        b'{"virtnet":1,"do":' + b"9" * 5000 + b"}\n",
        b"x" * (lines.REQUEST_MAX + (1 << 20)),
    ],
)
def test_nonsense_is_answered_with_what_was_expected(lab, said):
    error = json.loads(talk(said))["error"]
    assert error["message"]
    assert len(error["message"]) < 500
    assert vn.attach("lab").spec == lab.spec


@pytest.mark.parametrize("said", [b"", b'{"virtnet":1,"do":"stats"}'])
def test_a_caller_that_leaves_before_it_has_asked_is_forgotten(lab, said):
    assert talk(said) == b""
    assert eventually(lambda: "virtnet-caller" not in callers())
    assert lab.running


def test_silent_callers_hold_nobody_up_and_go_when_their_time_is_over(lab, monkeypatch):
    monkeypatch.setattr(server, "ASK_S", 1.0)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(server.CALLERS_MAX + 8)]
    try:
        for caller in silent:
            caller.connect(str(place.find("lab")))
        # Among as many as there is room for, the others are told so at once.
        assert eventually(lambda: callers().count("virtnet-caller") == server.CALLERS_MAX)
        with pytest.raises(vn.StateError, match="others ask this network already"):
            vn.attach("lab").stats()
        lab["a"].end.tx([frame(mac(2), mac(1))])
        assert len(receive(lab["b"].end)) == 1
        assert eventually(lambda: "virtnet-caller" not in callers(), 20)
        assert vn.attach("lab").running
    finally:
        for caller in silent:
            caller.close()


def test_a_caller_that_does_not_take_its_answer_does_not_keep_the_network_from_ending(monkeypatch):
    monkeypatch.setitem(server.REQUESTS, "stats", lambda *_rest: "x" * (8 << 20))
    with vn.Net(name="lab") as net, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(place.find("lab")))
        caller.sendall(lines.request("stats", {}))
        assert eventually(lambda: "virtnet-caller" in callers())
        time.sleep(0.1)
        net.stop()
        assert eventually(lambda: callers() == [])


def test_descriptors_that_nobody_asked_for_are_closed(lab):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(20)
        caller.connect(str(place.find("lab")))
        socket.send_fds(caller, [lines.request("about", {})], [0, 1, 2])
        assert json.loads(caller.recv(4096))["result"]["pid"] == os.getpid()
    assert lab.running  # and nothing_left counts


def test_another_users_request_is_refused(lab, monkeypatch):
    monkeypatch.setattr(server, "CREDENTIALS", type("Other", (), {"size": 12, "unpack": lambda _raw: (1, 4712, 1)}))
    said = json.loads(talk(lines.request("about", {})))
    assert said["error"]["kind"] == "StateError"
    assert "user 4712 is not let in" in said["error"]["message"]
    assert lab.running


def test_what_answers_something_else_is_named(sockets):
    path = sockets / "lab.sock"
    answers = [b"hello\n", b'{"virtnet":3}\n', b'{"virtnet":1,"error":7}\n', b"", b'{"virtnet":1,"result":']
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(str(path))
        odd.listen()

        def serve() -> None:
            for said in answers:
                caller, _ = odd.accept()
                with caller:
                    caller.recv(4096)
                    caller.sendall(said)

        serving = threading.Thread(target=serve)
        serving.start()
        for _ in answers:
            with pytest.raises(vn.PeerError):
                vn.attach(str(path))
        serving.join(10)
        with pytest.raises(vn.StateError, match=r"does not answer within 0\.2 s"):
            vn.attach(str(path), timeout_s=0.2)


def test_a_network_that_nobody_holds_any_more_lets_go_of_its_socket():
    net = vn.Net(name="lab").start()
    assert vn.networks() == ("lab",)
    del net
    gc.collect()
    assert eventually(lambda: vn.networks() == ())
    assert eventually(lambda: callers() == [])


def read_all(descriptor: int, into: list[bytes]) -> threading.Thread:
    """A reader of a pipe that reads to its end."""

    def read() -> None:
        with os.fdopen(descriptor, "rb") as pipe:
            into.append(pipe.read())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def send(lab: vn.Net, n: int = 1) -> None:
    lab["a"].end.tx([frame(mac(2), mac(1))] * n)
    assert len(receive(lab["b"].end, n)) == n


@pytest.mark.parametrize("suffix", ["pcap", "pcapng"])
def test_a_capture_from_beside_is_written_with_the_callers_rights_where_the_caller_is(
    lab, tmp_path, monkeypatch, suffix
):
    monkeypatch.chdir(tmp_path)
    attached = vn.attach("lab")
    with attached.capture("a", f"out.{suffix}") as capture:
        assert capture.running
        send(lab, 3)
        assert eventually(lambda: lab[capture.name].stats().sent == 3)
        assert attached.stats().ports[capture.name].sent == 3
        assert not attached.plan(lab.spec)
    assert (capture.packets, capture.dropped, capture.why) == (3, 0, None)
    assert not capture.running
    assert lab.captures == ()
    with vn.PcapPort(tmp_path / f"out.{suffix}", mode="read") as port:
        assert len(receive(port, 3)) == 3
    with pytest.raises(vn.ConfigError, match="exists already"):
        attached.capture("a", f"out.{suffix}")
    with attached.capture(("a", "sw"), f"out.{suffix}", overwrite=True):
        send(lab)
        assert eventually(lambda: lab.captures[0].packets == 1)
    with vn.PcapPort(tmp_path / f"out.{suffix}", mode="read") as port:
        assert len(receive(port, 2, 0.3)) == 1


@pytest.mark.parametrize("columns", [False, True])
def test_a_capture_of_several_places_from_beside(lab, tmp_path, columns):
    attached = vn.attach("lab")
    path = tmp_path / "out.pcapng"
    with attached.capture(["a", (lab["sw"], "b")], *([] if columns else [path])) as capture:
        assert capture.places == ("a", "sw-b")
        send(lab)
        assert eventually(lambda: lab[capture.name].stats().sent == 2)
        before = lab.spec
        attached.apply(vn.Spec(before.ports | {"c": vn.PortSpec.of("memory", "c")}, before.functions, before.cables))
        attached.rollback()
        send(lab)
        assert eventually(lambda: lab[capture.name].stats().sent == 4)
    expected = [(0, 1), (1, 1)] * 2
    if columns:
        found = capture.read().columns
        assert list(zip(found.place.tolist(), found.direction.tolist(), strict=True)) == expected
    else:
        with RawPcapNgReader(str(path)) as reader:
            found = [(capture.places.index(about.ifname.decode()), about.direction) for _, about in reader]
        assert found == expected
    assert lab.captures == ()
    for where, says in (([], "found 0"), (["a", ("sw", "a")], "same cable"), (["a", "x"], "no node 'x'")):
        with pytest.raises(vn.ConfigError, match=says):
            attached.capture(where, tmp_path / "other.pcapng")
        assert not (tmp_path / "other.pcapng").exists()


def test_a_capture_from_beside_ends_when_its_reader_or_its_caller_leaves(lab):
    attached = vn.attach("lab")
    for leaves in ("reader", "caller"):
        reader, writer = os.pipe()
        capture = attached.capture(lab["a"], writer)
        os.close(writer)
        send(lab)
        assert os.read(reader, 1 << 16)
        if leaves == "reader":
            os.close(reader)
            assert capture.wait(10)
            assert capture.why == "its reader has left"
        else:
            capture._connection.close()
            while os.read(reader, 1 << 16):  # to its end
                pass
            os.close(reader)
        assert eventually(lambda: lab.captures == ())
        send(lab)


def test_a_capture_from_beside_ends_with_the_network(sockets):
    name = str(sockets / "lab.sock")
    found: list[bytes] = []
    with vn.Net(name=name) as net:
        net.memory("a") >> net.memory("b")
        reader, writer = os.pipe()
        reading = read_all(reader, found)
        capture = vn.attach(name).capture("a", writer)
        os.close(writer)
        send(net, 2)
        assert eventually(lambda: net[capture.name].stats().sent == 2)
    assert capture.wait(10)
    reading.join(10)
    assert found[0].startswith(b"\n\r\r\n")
    assert capture.packets == 2


def test_columns_from_beside_are_what_passes_and_what_is_left_comes_with_the_end(lab):
    attached = vn.attach("lab")
    with attached.capture("a", snap=20) as capture:
        assert len(capture.read()) == 0
        lab["a"].end.tx([frame(mac(2), mac(1), b"one"), bytes(mac(2) + mac(1)).ljust(1500, b"x")])
        assert eventually(lambda: lab[capture.name].stats().sent == 2)
        found = capture.read(timeout_s=10)
        assert [bytes(one) for one in found] == [frame(mac(2), mac(1), b"one")[:20], (mac(2) + mac(1)).ljust(20, b"x")]
        assert found.columns.wire_length.tolist() == [60, 1500]
        assert (abs(found.columns.time_ns - time.time_ns()) < 60 * 10**9).all()
        assert attached.stats().ports[capture.name].sent == 2
        lab["b"].end.tx([frame(mac(1), mac(2))] * 3)
        assert eventually(lambda: lab[capture.name].stats().sent == 5)
    assert [len(capture.read()), len(capture.read())] == [3, 0]
    assert (capture.packets, capture.dropped, capture.running) == (5, 0, False)
    assert lab.captures == ()
    assert lab.stats().balance().exact


def test_columns_from_beside_take_bounded_memory_and_count_what_was_lost(lab):
    with vn.attach("lab").capture("a", memory=1 << 14) as capture:
        for _ in range(10):
            send(lab, 50)
        assert eventually(lambda: sum(lab[capture.name].stats().drops.values()) > 0)
        assert eventually(lambda: lab.captures[0].packets + lab.captures[0].dropped == 500)
        kept = len(capture.read())
        assert 0 < kept * (60 + 34) <= 1 << 14
        assert (capture.packets, capture.dropped) == (kept, 500 - kept)
        send(lab)  # there is room again
        assert len(capture.read(timeout_s=10)) == 1
    assert (capture.packets, capture.dropped) == (kept + 1, 500 - kept)


def test_columns_from_beside_are_many_bytes_at_once(lab):
    frames = [mac(2) + mac(1) + bytes([n]) * 60_000 for n in range(200)]
    with vn.attach("lab").capture("a") as capture:
        for first in range(0, 200, 20):
            lab["a"].end.tx(frames[first : first + 20])
            assert len(receive(lab["b"].end, 20)) == 20
        assert eventually(lambda: lab[capture.name].stats().sent == 200)
        found = capture.read(timeout_s=10)
    assert [bytes(one) for one in found] == frames


@pytest.mark.parametrize("leaves", ["caller", "place", "network"])
def test_columns_from_beside_end_when_caller_place_or_network_leave(sockets, leaves):
    name = str(sockets / "lab.sock")
    with vn.Net(name=name) as net:
        net.memory("a") >> net.switch(name="sw") << net.memory("b")
        capture = vn.attach(name).capture("a")
        send(net, 2)
        if leaves == "caller":
            capture._connection.close()
            assert eventually(lambda: net.captures == ())
            return
        if leaves == "place":
            net.remove("a")
            assert capture.wait(10)
            assert net.captures == ()
        else:
            net.stop()
            assert capture.wait(10)
    assert not capture.running
    assert len(capture.read(timeout_s=None)) == 2
    assert capture.packets == 2


@pytest.mark.parametrize(
    ("options", "says"), [({"snap": 1}, "snap"), ({"memory": 1 << 40}, "memory"), ({"filter": 7}, "filter is a text")]
)
def test_columns_from_beside_are_refused_by_name(lab, options, says):
    with pytest.raises(vn.ConfigError, match=says):
        vn.attach("lab").capture("a", **options)
    with pytest.raises(vn.ConfigError, match=says):
        vn.attach("lab")._ask("columns", where="a", **options)
    assert lab.captures == ()


@pytest.mark.parametrize(
    ("where", "options", "says"),
    [
        ("x", {}, "no node 'x'"),
        ("sw", {}, "2 cables"),
        (("a", "b"), {}, "no cable between"),
        ("a", {"filter": "tpc"}, "no packet filter|libpcap"),
    ],
)
def test_a_capture_that_is_refused_leaves_no_file(lab, tmp_path, where, options, says):
    with pytest.raises(vn.ConfigError, match=says):
        vn.attach("lab").capture(where, tmp_path / "out.pcapng", **options)
    assert not (tmp_path / "out.pcapng").exists()
    assert lab.captures == ()
    with pytest.raises(vn.PortError, match="cannot write the capture"):
        vn.attach("lab").capture("a", "/no/such/place.pcapng")


@pytest.mark.parametrize("arguments", [{}, {"where": 7}, {"where": []}, {"where": ["a"], "filter": 7}])
def test_a_capture_needs_a_descriptor_and_a_place(lab, arguments):
    with pytest.raises(vn.ConfigError, match="descriptor"):
        vn.attach("lab")._ask("capture", **arguments)
    for descriptors in ([], [0]):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(20)
            caller.connect(str(place.find("lab")))
            line = lines.request("capture", arguments)
            socket.send_fds(caller, [line], descriptors) if descriptors else caller.sendall(line)
            assert json.loads(caller.recv(4096))["error"]["kind"] == "ConfigError"
    assert lab.captures == ()


def virtnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "virtnet", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_line_shows_changes_and_stops_what_another_one_runs(sockets):
    lab = sockets / "lab.toml"
    lab.write_text(
        f'cables = [["vm1", "sw"]]\nports.vm1.port = "vhost-user:{sockets}/vm1"\nfunctions.sw.kind = "switch"\n'
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "virtnet", "run", str(lab), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert eventually(lambda: vn.networks() == ("lab",), 20)
        assert f"lab: process {running.pid}, 1 ports, 1 functions" in virtnet("list").stdout
        assert json.loads(virtnet("list", "--json").stdout)[0]["pid"] == running.pid
        with vn.VirtioUserPort(sockets / "vm1") as driver:
            assert driver.wait_connected(10)
            shown = virtnet("show", "lab").stdout
            assert "vm1" in shown
            assert "ring 0 (receiveq of pair 0) runs" in shown
            table = virtnet("show", "lab", "--rings").stdout
            assert "transmitq 0" in table
            assert "kicks" in table
            told = json.loads(virtnet("show", "lab", "vm1", "--json").stdout)
            assert told["ports"]["vm1"]["stats"]["connected"]
            assert "connected: a front-end has come" in virtnet("show", "lab", "vm1").stdout
        assert vn.Spec.from_toml(virtnet("show", "lab", "--toml").stdout) == vn.Spec.read(lab)
        lab.write_text(lab.read_text().replace('["vm1", "sw"]', '["vm1", "sw"], ["vm2", "sw"]'))
        lab.write_text(lab.read_text() + f'ports.vm2.port = "vhost-user:{sockets}/vm2"\n')
        assert "+ vm2: vhost-user:" in virtnet("apply", "lab", str(lab), "--plan").stdout
        assert not (sockets / "vm2").exists()
        assert "+ vm2: vhost-user:" in virtnet("apply", "lab", str(lab)).stdout
        assert (sockets / "vm2").exists()
        assert json.loads(virtnet("stats", "lab", "--json").stdout)["balance"]["exact"]
        assert "0 received = 0 sent" in virtnet("stats", "lab").stdout
        assert "- vm2: vhost-user:" in virtnet("rollback", "lab").stdout
        missed = virtnet("show", "lap")
        assert missed.returncode == 1
        assert "did you mean lab?" in missed.stderr
        again = virtnet("run", str(lab))
        assert (again.returncode, again.stderr.count("\n")) == (1, 1)
        assert "take another name" in again.stderr
        watch = subprocess.Popen(
            [sys.executable, "-m", "virtnet", "stats", "lab", "--watch", "--json"], stdout=subprocess.PIPE, text=True
        )
        assert json.loads(watch.stdout.readline())["ports"]["vm1"]
        watch.send_signal(signal.SIGINT)
        watch.communicate(timeout=20)
        assert watch.returncode == 0
        assert virtnet("stop", "lab").returncode == 0
        out, _ = running.communicate(timeout=20)
        assert running.returncode == 0
        assert json.loads(out)["balance"]["exact"]
    finally:
        if running.poll() is None:
            running.kill()
            running.communicate()


def test_the_command_line_captures_what_another_process_runs(sockets):
    name = str(sockets / "lab.sock")
    with vn.Net(name=name) as net:
        net.memory("a") >> net.switch(name="sw") << net.memory("b")
        for place in ("a", "a,sw"):
            taking = subprocess.Popen(
                [sys.executable, "-m", "virtnet", "capture", name, place, "--seconds", "60"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            head = taking.stdout.read(28)
            assert head.startswith(b"\n\r\r\n")
            assert taking.stderr.readline() == f"capturing at {place}; Ctrl-C ends it\n".encode()
            assert "capture" in net.stats().ports
            send(net, 4)
            assert eventually(lambda: net.captures[0].packets == 4)
            taking.send_signal(signal.SIGINT)
            rest, said = taking.communicate(timeout=20)
            assert (taking.returncode, said) == (0, b"4 packets captured\n")
            assert rest.count(frame(mac(2), mac(1))) == 4
        terminal, ours = os.openpty()
        refused = subprocess.run(
            [sys.executable, "-m", "virtnet", "capture", name, "a"],
            stdout=ours,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        os.close(terminal)
        os.close(ours)
        assert refused.returncode == 2
        assert b"not for a terminal" in refused.stderr
        assert net.captures == ()


def test_the_command_line_captures_several_places_into_one_file(sockets, tmp_path):
    name, out = str(sockets / "lab.sock"), tmp_path / "out.pcapng"
    with vn.Net(name=name) as net:
        net.memory("a") >> net.switch(name="sw") << net.memory("b")
        command = [sys.executable, "-m", "virtnet", "capture", name, "a", "sw,b"]
        for file in ([], ["-"], [str(out)]):
            taking = subprocess.Popen([*command, *file], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            into = f" into {out}" if file == [str(out)] else ""
            assert taking.stderr.readline() == f"capturing at a sw,b{into}; Ctrl-C ends it\n".encode()
            send(net, 2)
            assert eventually(lambda: net.captures[0].packets == 4)
            taking.send_signal(signal.SIGINT)
            written, said = taking.communicate(timeout=20)
            assert (taking.returncode, said) == (0, b"4 packets captured\n")
            if file != [str(out)]:
                out.write_bytes(written)
            with RawPcapNgReader(str(out)) as reader:
                found = [(about.ifname, about.direction) for _, about in reader]
            assert found == [(b"a", 1)] * 2 + [(b"sw-b", 1)] * 2
            out.unlink()
        refused = virtnet("capture", name, "a", "x", "b")
        assert refused.returncode == 2
        assert "no node 'x'" in refused.stderr
        refused = virtnet("capture", name, "a", "b", str(out), "--filter", "arp", "--filter", "ip", "--filter", "ip6")
        assert refused.returncode == 2
        assert "one for each of 2 places" in refused.stderr
        assert not out.exists()
