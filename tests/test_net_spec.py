"""A network as a value: read, written, compared; planned, applied and taken back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtnet as vn
from helpers import eventually, frame, mac, receive

LAB = """
cables = [["vm1", "sw"], ["vm2", "sw"]]

[net]
poll = "interrupt"

[ports.vm1]
kind = "vhost-user"
where = "vm1.sock"
queue_pairs = 2

[ports.vm2]
port = "vhost-user:vm2.sock,client=on"

[functions.sw]
kind = "switch"
ageing_s = 5
"""


def changed(spec: vn.Spec, **parts: dict) -> vn.Spec:
    """The same with other parts; a node that becomes ``None`` is left out."""
    document = spec.to_dict()
    for part, entries in parts.items():
        if part == "cables":
            document[part] = entries
            continue
        merged = {**document.get(part, {}), **entries}
        document[part] = {name: entry for name, entry in merged.items() if entry is not None}
    return vn.Spec.from_dict(document)


def test_a_file_is_read_and_written_back():
    spec = vn.Spec.from_toml(LAB)
    assert spec.ports["vm1"].options["queue_pairs"] == 2
    assert spec.ports["vm2"].options["client"]
    assert spec.functions["sw"].chosen() == {"ageing_s": 5.0}
    assert spec.cables == {("sw", "vm1"), ("sw", "vm2")}
    assert spec.poll == "interrupt"
    again = vn.Spec.from_toml(spec.to_toml())
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ports.vm1 = {kind = 'vhost-user'}", "ports.vm1: 'where' is a required property"),
        (
            "ports.vm1 = {kind = 'vhost-user', where = 'a', queue_pairs = 300}",
            "ports.vm1.queue_pairs: expected a whole number from 1 to 128, found 300",
        ),
        ("ports.vm1 = {kind = 'vhost', where = 'a'}", "ports.vm1.kind: 'vhost' is not one of"),
        ("ports.vm1 = {kind = 'tap', where = 'a', queue = 3}", "ports.vm1: Additional properties are not allowed"),
        ("ports.vm1.port = 'tap:a b'", "ports.vm1: an interface's name has at most 15 bytes"),
        ("ports.vm1.port = 'tap:a,mtu=1'", "ports.vm1: tap option mtu: expected a whole number from 68"),
        ("functions.s = {kind = 'switch', ageing_s = 0}", "functions.s.ageing_s: 0 is less than or equal"),
        ("functions.s = {kind = 'source', frames = ['abc']}", "functions.s.frames[0]: expected a frame in hexadecimal"),
        ("functions.s.kind = 'swich'", "functions.s.kind: 'swich' is not one of"),
        ("cables = [['a', 'b', 'c']]", "cables[0]: ['a', 'b', 'c'] is too long"),
        (
            "cables = [['vm', 'sw']]\nports.vm1.port = 'tap:a'",
            "cables: 'vm' to 'sw': there is no 'vm' (did you mean vm1?)",
        ),
        (
            "cables = [['a', 's'], ['a', 't']]\nports.a.port = 'tap:a'\nfunctions = {s.kind = 'sink', t.kind = 'sink'}",
            "cables: a port takes one cable, and 'a' is joined to 's' and 't': put a switch between",
        ),
        ("ports.a.port = 'tap:a'\nfunctions.a.kind = 'sink'", "functions.a: a port has that name already"),
        ("net.cpus = [-1]", "net.cpus[0]: -1 is less than the minimum of 0"),
        ("x = 1", "Additional properties are not allowed ('x' was unexpected)"),
        ("x =", "this is no TOML"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(text, message):
    with pytest.raises(vn.ConfigError) as refused:
        vn.Spec.from_toml(text)
    assert str(refused.value).startswith(message)


def test_the_schema_is_one_and_takes_what_is_written():
    schema = vn.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(vn.Spec.from_toml(LAB).to_dict(), schema)


def test_what_a_program_builds_is_a_value_too():
    net = vn.Net()
    net.memory("a") >> net.switch(name="sw") << net.memory("b")
    net.source([b"\x02" * 60, b"\x04" * 61], size=64, rate_pps=10, name="gen") >> net["sw"]
    net.vhost_user("c.sock") >> net.tap("d")
    spec = net.spec
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    assert spec.functions["c-d"].kind == "wire"
    assert spec.functions["gen"].options["frames"] == ["02" * 60, "04" * 61]
    assert vn.Net.of(spec).spec == spec


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=10)


@given(
    st.dictionaries(NAMES, st.sampled_from(["memory:m", "tap:t0", "vhost-user:a,,b.sock,queue_pairs=3"]), max_size=4),
    st.dictionaries(NAMES, st.sampled_from(["switch", "sink", "echo"]), max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_value_is_read_back_as_it_was(ports, functions, chance):
    functions = {name: vn.FunctionSpec(kind) for name, kind in functions.items() if name not in ports}
    cables = {(port, chance.choice(list(functions))) for port in ports} if functions else set()
    spec = vn.Spec({name: vn.PortSpec.parse(text) for name, text in ports.items()}, functions, frozenset(cables))
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    assert not vn.Plan(spec, spec)


def test_what_stays_keeps_its_state_and_loses_nothing():
    with vn.Net() as net:
        a, b, switch = net.memory("a"), net.memory("b"), net.switch(name="sw")
        a >> switch << b
        b.end.tx([frame(mac(1), mac(2))])  # the switch knows station 2 now
        receive(a.end)
        plan = net.apply(
            changed(
                net.spec,
                ports={"c": {"port": "memory:c"}},
                functions={"sw": {"kind": "switch", "ageing_s": 7}},
                cables=[*map(list, net.cables), ["c", "sw"]],
            )
        )
        assert (plan.added, plan.removed, plan.changed, plan.restarted) == (("c",), (), ("sw",), ())
        assert (plan.plugged, plan.touched) == ((("c", "sw"),), ())
        assert net["a"] is a
        assert switch.spec.options["ageing_s"] == 7

        a.end.tx([frame(mac(2), mac(1))])
        assert len(receive(b.end)) == 1
        assert receive(net["c"].end, timeout_s=0.05) == [], "a known station was flooded"
        assert net.stats().ports["a"].received == 1


def test_a_source_gets_another_rate_while_it_runs():
    with vn.Net() as net:
        net.source(name="gen", count=3) >> net.memory("a")
        assert len(receive(net["a"].end, 3)) == 3
        net.apply(changed(net.spec, functions={"gen": {"kind": "source", "count": 5, "rate_pps": 1e6}}))
        assert len(receive(net["a"].end, 5)) == 5
        assert net.stats().functions["gen"].generated == 8


def test_a_change_is_taken_back():
    with vn.Net() as net:
        net.memory("a") >> net.switch(name="sw") << net.memory("b")
        first = net.spec
        net.apply(changed(first, functions={"sw": {"kind": "switch", "ageing_s": 7}}))
        second = net.spec
        net.apply(changed(second, ports={"b": None}, cables=[["a", "sw"]]))
        assert net.rollback().added == ("b",)
        assert net.spec == second
        assert net.rollback().changed == ("sw",)
        assert net.spec == first
        with pytest.raises(vn.StateError, match="nothing was applied"):
            net.rollback()
        net["b"].end.tx([frame(mac(1), mac(2))])
        assert len(receive(net["a"].end)) == 1


def test_a_socket_is_opened_anew_with_other_options(sockets):
    with vn.Net() as net:
        net.vhost_user(sockets / "a", name="a") >> net.memory("m")
        plan = net.apply(changed(net.spec, ports={"a": {"port": f"vhost-user:{sockets}/a,queue_pairs=2"}}))
        assert plan.restarted == ("a",)
        assert plan.touched == ("a", "m")
        with vn.VirtioUserPort(sockets / "a", queue_pairs=2) as driver:
            assert driver.wait_connected(5)
        assert net["a"].spec.options["queue_pairs"] == 2


def test_a_change_that_fails_leaves_everything_as_it_was(sockets):
    with vn.Net() as net:
        net.vhost_user(sockets / "a", name="a") >> net.switch(name="sw") << net.memory("m")
        before = net.spec
        for broken in ("vhost-user:/no/such/place", "tap:lo"):
            wanted = changed(
                before,
                ports={"a": {"port": f"vhost-user:{sockets}/a,queue_pairs=2"}, "x": {"port": broken}},
                cables=[*map(list, before.cables), ["x", "sw"]],
            )
            with pytest.raises(vn.VirtnetError):
                net.apply(wanted)
            assert net.spec == before
            assert net["a"].spec.options["queue_pairs"] == 1
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
            assert eventually(lambda: net["a"].connected)
            driver.tx([frame(mac(1), mac(2))])
            assert len(receive(net["m"].end)) == 1
        with pytest.raises(vn.ConfigError, match="stay while the network runs"):
            net.apply(vn.Spec(before.ports, before.functions, before.cables, poll="busy"))


def test_a_thousand_ports_come_and_go_and_untouched_paths_lose_nothing():
    with vn.Net() as net:
        net.source(name="gen", size=60) >> net.sink(name="end")
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch(name="sw") << b
        before = net.spec
        ports = {f"p{n}": vn.PortSpec.of("memory", f"p{n}", capacity=8) for n in range(1000)}
        many = vn.Spec({**before.ports, **ports}, before.functions, before.cables | {(name, "sw") for name in ports})
        sent = 0
        for wanted in (many, before, many, before):
            plan = net.apply(wanted)
            assert len(plan.added) + len(plan.removed) == 1000
            assert plan.touched == ()
            sent += a.end.tx([frame(mac(1), mac(2))] * 100)
            assert len(receive(b.end, 100)) == 100
        stats = net.stats()
        assert stats.balance().exact
        assert stats.ports["a"].received == sent == 400
        assert stats.functions["gen"].generated > 0


def virtnet(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", "from virtnet.cli import main; main()", *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_file_runs_and_is_read_again(sockets):
    lab = Path(sockets / "lab.toml")
    lab.write_text("cables = [['a', 'sw']]\nports.a.port = 'vhost-user:a'\nfunctions.sw.kind = 'switch'\n")
    process = virtnet("run", "lab.toml", "--json", cwd=sockets)
    try:
        assert "running: a vhost-user" in process.stderr.readline()
        lab.write_text("ports.a.port = 'vhost-user:a'\nnonsense = 1\n")
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline().startswith("not reloaded: lab.toml: Additional properties")
        lab.write_text("ports = {a.port = 'vhost-user:a', b.port = 'vhost-user:b'}\n")
        process.send_signal(signal.SIGHUP)
        said = [process.stderr.readline() for _ in range(4)]
        assert said[:3] == ["reloaded:\n", "- sw: switch\n", "+ b: vhost-user:b\n"]
        with vn.VirtioUserPort(sockets / "b") as driver:
            assert driver.wait_connected(5)
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert set(json.loads(out)["ports"]) == {"a", "b"}


def test_a_file_is_checked_without_being_run(tmp_path):
    lab = tmp_path / "lab.toml"
    for text, code, said in [
        (LAB, 0, f"{lab}: 2 ports, 1 functions, 2 cables\n"),
        ("ports.a.port = 'memory:a'", 2, f"virtnet: {lab}: ports.a: its other end is in a Python program"),
        ("net.poll = 'never'", 2, f"virtnet: {lab}: net.poll: 'never' is not one of"),
    ]:
        lab.write_text(text)
        process = virtnet("run", str(lab), "--check")
        out, error = process.communicate(timeout=20)
        assert process.returncode == code
        assert (out + error).startswith(said)
    process = virtnet("run", os.fspath(tmp_path / "no.toml"))
    assert process.communicate(timeout=20)[1].startswith(f"virtnet: cannot read {tmp_path}/no.toml: ")


def test_the_command_prints_the_schema():
    out, _ = virtnet("schema").communicate(timeout=20)
    assert json.loads(out) == vn.schema()
