"""How does a network from a file change while it runs?

Reads `lab.toml`, adds a third machine and another ageing time, looks at what that will do, does it, and takes it back.
"""

import contextlib
import tempfile
from pathlib import Path

import virtnet as vn

lab = vn.Spec.read(Path(__file__).with_name("lab.toml"))

document = lab.to_dict()
document["ports"]["vm3"] = {"port": "vhost-user:vm3.sock"}
document["cables"].append(["vm3", "sw"])
document["functions"]["sw"]["ageing_s"] = 60
wanted = vn.Spec.from_dict(document)

# The sockets of a file stand where the program runs.
with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory), vn.Net.of(lab) as net:
    print(net.plan(wanted))  # the switch is changed in place: it keeps what it has learnt
    plan = net.apply(wanted)
    print(f"held up: {', '.join(plan.touched) or 'nobody'}")
    print(f"now: {', '.join(sorted(net.spec.ports))}")
    net.rollback()
    print(f"and back: {', '.join(sorted(net.spec.ports))}")
